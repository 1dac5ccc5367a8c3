"""What the tests of the browser example need: its packages, its SQL, a server for its files, and Chromium.

Where node, npm or Chromium is missing they are skipped, or fail if PGPARK_TEST_NEEDS_BROWSER is set.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "browser"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing(what: str) -> NoReturn:
    if os.environ.get("PGPARK_TEST_NEEDS_BROWSER"):
        pytest.fail(f"PGPARK_TEST_NEEDS_BROWSER is set, but {what}")
    pytest.skip(what)


def command(name: str) -> str:
    return shutil.which(name) or missing(f"there is no {name} on this machine")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node_modules of the example, as its lock file says."""
    npm = command("npm")
    modules = EXAMPLE / "node_modules"
    with (tmp_path_factory.getbasetemp().parent / "npm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side
        installed = modules / ".package-lock.json"
        if not installed.exists() or installed.stat().st_mtime < (EXAMPLE / "package-lock.json").stat().st_mtime:
            _install(npm)
    return modules


def _install(npm: str) -> None:
    done = subprocess.run([npm, "ci"], cwd=EXAMPLE, capture_output=True, text=True)
    if done.returncode != 0:
        missing(f"npm could not install the packages of examples/browser: {done.stderr.strip()[-500:]}")


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pgpark migrate --dump-sql` prints."""
    path = tmp_path_factory.mktemp("sql") / "pgpark.sql"
    with path.open("w") as out:
        subprocess.run([sys.executable, "-m", "pgpark", "migrate", "--dump-sql"], stdout=out, check=True)
    return path


class _Handler(SimpleHTTPRequestHandler):
    """The files of the example, with the SQL of this tree."""

    script: Path

    def translate_path(self, path: str) -> str:
        return str(self.script) if path == "/pgpark.sql" else super().translate_path(path)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def site(packages: Path, script: Path) -> Iterator[str]:
    """The URL of the example on a free port."""
    assert packages.parent == EXAMPLE
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(EXAMPLE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def chromium() -> Iterator[Browser]:
    """A browser for one test: while it is open, its driver keeps an event loop running in this thread."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=path or missing("there is no Chromium on this machine"), args=FLAGS
        )
