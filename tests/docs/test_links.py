"""Every relative link of every Markdown file leads somewhere, in the repository and on the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, anchors, files, links


@pytest.mark.parametrize("file", files())
def test_links_of_a_file_lead_to_files_and_headings_that_are_there(file: str) -> None:
    wrong = []
    for link in links(file):
        if not link.target.exists():
            wrong.append(f"{link}: there is no {os.path.relpath(link.target, ROOT)}")
        elif link.anchor and link.anchor not in anchors(link.target):
            wrong.append(f"{link}: {os.path.relpath(link.target, ROOT)} has no heading #{link.anchor}")
    assert not wrong, "\n".join(wrong)


def test_links_were_found() -> None:
    assert sum(len(links(file)) for file in files()) > 100


_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"']?([^\"'\s>]+)|<link\b[^>]*\shref=[\"']?([^\"'\s>]+)"
)


def test_the_site_builds_holds_every_document_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    built = subprocess.run(  # strict: a page outside the navigation and a link that leads nowhere are errors
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for file in files():
        if file.startswith("docs/"):
            assert (tmp_path / file.removeprefix("docs/")).with_suffix(".html").is_file(), file
    assert "parking lot" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "repository" / "bench" / "index.html").is_file()
    for page in tmp_path.rglob("*.html"):
        for script, sheet in _LOADED.findall(page.read_text()):
            assert not re.match(r"(https?:)?//", script or sheet), f"{page.relative_to(tmp_path)}: {script or sheet}"
    for file in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", file.read_text()), file
