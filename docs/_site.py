"""Hooks of `mkdocs build`: the site holds what its pages link to, wherever in the repository that is.

The README is its home. Other files outside docs/ get pages, or lie as they are, below repository/; links are
rewritten, so that one text serves the repository and the site. The decisions are listed in the order of their numbers.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_HOME = "README.md"
_OUTSIDE = "repository/"
_DECISIONS = "docs/decisions"


def _uri(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path == _HOME:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else _OUTSIDE + path


def _path(uri: str) -> str:
    """The file of the repository that is at this place of the site."""
    if uri == "index.md":
        return _HOME
    return uri.removeprefix(_OUTSIDE) if uri.startswith(_OUTSIDE) else f"docs/{uri}"


def _targets(path: str, text: str) -> set[str]:
    """The files of the repository that a Markdown file links to."""
    links = (urlsplit(link) for _, link, _ in LINK.findall(text))
    joined = (
        posixpath.normpath(posixpath.join(posixpath.dirname(path), link.path))
        for link in links
        if link.path and not link.scheme and not link.netloc
    )
    return {_of_folder(target) if (ROOT / target).is_dir() else target for target in joined if (ROOT / target).exists()}


def _of_folder(path: str) -> str:
    """What is shown for a folder: its README, or a list."""
    return f"{path}/index.md" if path == _DECISIONS else f"{path}/README.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the decisions in the navigation, where it says `decisions`."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "decisions" in entry.values():
            entry["Decisions"] = ["decisions/index.md", *(f"decisions/{path.name}" for path in _decisions())]
    return config


def _decisions() -> list[Path]:
    return sorted((ROOT / _DECISIONS).glob("[0-9]*.md"))


def _list_of_decisions() -> str:
    titles = ((path.name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for path in _decisions())
    return "# Decisions\n\nWhat a newcomer would question, and why it is so.\n\n" + "".join(
        f"- [{title}]({name})\n" for name, title in titles
    )


def _list_of_files(folder: str) -> str:
    """What is shown for a folder without a README."""
    paths = sorted(path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = [path.relative_to(ROOT / folder).as_posix() for path in paths]
    return f"# {folder}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README, and what is linked to outside docs/, also from there."""
    files.append(File.generated(config, "decisions/index.md", content=_list_of_decisions()))
    waiting = {_HOME} | {f"docs/{file.src_uri}" for file in files.documentation_pages()}
    waiting |= {_path(uri) for uri in re.findall(r"repository/[\w./-]+", (ROOT / "mkdocs.yml").read_text())}
    seen = {f"{_DECISIONS}/index.md"}
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not (ROOT / path).is_file():
            text = _list_of_files(posixpath.dirname(path))
            waiting |= _targets(path, text) - seen
            files.append(File.generated(config, _uri(path), content=text))
            continue
        if files.get_file_from_path(_uri(path)) is None:
            files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting |= _targets(path, (ROOT / path).read_text(encoding="utf-8")) - seen
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links between files of the repository as links between places of the site."""
    del config, files
    path = _path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(found: re.Match[str]) -> str:
        link = urlsplit(found[2])
        if link.scheme or link.netloc or not link.path:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link.path))
        target = _of_folder(target) if (ROOT / target).is_dir() else target
        place = posixpath.relpath(_uri(target), folder or ".")
        return f"{found[1]}{place}{'#' + link.fragment if link.fragment else ''}{found[3]}"

    return LINK.sub(rewritten, markdown)
