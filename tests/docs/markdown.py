"""The Markdown files of the repository, and what is in them: headings, links, fenced blocks."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\](?:\[[^\]]*\])?\(([^()\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: in which file, at which line, in which language, and what it says."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Link:
    """A relative link: the file it stands in, the file it means, and the anchor there."""

    file: str
    line: int
    target: Path
    anchor: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@cache
def files() -> tuple[str, ...]:
    """Every Markdown file that belongs to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return tuple(sorted(name for name in set(listed.stdout.splitlines()) if (ROOT / name).is_file()))
    places = [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "bench", "docker", "examples") for path in (ROOT / folder).rglob("*.md")),
    ]
    return tuple(sorted(str(path.relative_to(ROOT)) for path in places if "node_modules" not in path.parts))


@cache
def _text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def blocks(file: str) -> tuple[Block, ...]:
    """The fenced blocks of a file, without the indent of the list that they may stand in."""
    found = []
    for match in _FENCE.finditer(_text(file)):
        indent, _, language, body = match.groups()
        text = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        found.append(Block(file, _text(file).count("\n", 0, match.start()) + 1, language.strip(), text))
    return tuple(found)


def _prose(file: str) -> str:
    """The text with everything that is code blanked, so that lines keep their numbers."""
    blanked = _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), _text(file))
    return re.sub(r"`[^`\n]+`", lambda match: "x" * len(match[0]), blanked)


def links(file: str) -> list[Link]:
    """The relative links of a file, images too."""
    prose = _prose(file)
    found = []
    for match in _LINK.finditer(prose):
        link = urlsplit(match[1] or match[2])
        if not link.scheme and not link.netloc:
            path = (ROOT / file).parent / unquote(link.path) if link.path else ROOT / file
            found.append(Link(file, prose.count("\n", 0, match.start()) + 1, path, link.fragment))
    return found


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that a repository's page gives the headings of a file; the second of a name gets -1."""
    without_code = _FENCE.sub("", path.read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    made = set()
    for heading in _HEADING.findall(without_code):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        made.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return frozenset(made)
