"""The small story of examples/node, go and psql, each with its own client and workers: one worker is killed, the other
finishes its tasks, and the client that went away finds all results."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Database, psql, wait_for

EXAMPLES = Path(__file__).parents[2] / "examples"
_PG = Path(__file__).parents[2] / "bench" / "peers" / "node_modules" / "pg"
_DEBIAN_GO = Path("/usr/share/gocode/src/github.com/lib/pq")
_TASKS = 9

Commands = tuple[list[str], list[str]]  # of the client, of the worker


def _needed(where: str, found: object) -> None:
    """Skips where a toolchain is missing; fails where CI needs it."""
    if not found and os.environ.get("PGPARK_TEST_NEEDS_BROWSER"):
        pytest.fail(f"{where} is missing")
    if not found:
        pytest.skip(f"{where} is missing")


def node(folder: Path) -> Commands:
    """With the pg of the benches, else with one from the registry."""
    _needed("node", shutil.which("node"))
    copy = Path(shutil.copytree(EXAMPLES / "node", folder / "node", ignore=shutil.ignore_patterns("node_modules")))
    if _PG.is_dir():
        (copy / "node_modules").symlink_to(_PG.parent)
    else:
        subprocess.run(["npm", "install", "--silent", "--no-fund", "--no-audit"], cwd=copy, check=True, timeout=120)
    return ["node", str(copy / "client.mjs")], ["node", str(copy / "worker.mjs")]


def go(folder: Path) -> Commands:
    """With the lib/pq that Debian packages, or with what is in the module cache."""
    if not shutil.which("go") and os.environ.get("PGPARK_TEST_NEEDS_TOOLS"):
        pytest.fail("go is missing")
    if not shutil.which("go"):
        pytest.skip("go is missing")
    packaged = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode"} if _DEBIAN_GO.is_dir() else {"GOFLAGS": "-mod=mod"}
    environment = os.environ | packaged | {"GOCACHE": str(folder / "cache")}
    copy = Path(shutil.copytree(EXAMPLES / "go", folder / "go", ignore=shutil.ignore_patterns("bin")))
    build = next(line.partition("&&")[2] for line in _story("go") if "go build" in line)
    built = subprocess.run(shlex.split(build), cwd=copy, env=environment)
    if built.returncode and not _DEBIAN_GO.is_dir():
        pytest.skip("lib/pq cannot be had")
    assert built.returncode == 0
    client, worker = (next(line for line in _story("go") if words in line).split()[0] for words in _STORY[:2])
    return [str(copy / client)], [str(copy / worker)]


def by_psql(folder: Path) -> Commands:
    """With any psql."""
    (folder / "psql").symlink_to(psql())
    return [str(EXAMPLES / "psql" / "client.sh")], [str(EXAMPLES / "psql" / "worker.sh")]


@pytest.mark.slow
@pytest.mark.parametrize("language", [node, go, by_psql])
def test_one_worker_is_killed_and_who_left_finds_all_results(
    language: Callable[[Path], Commands], db: Database, tmp_path: Path
) -> None:
    client, worker = language(tmp_path)
    environment = os.environ | {"PGPARK_DSN": db.dsn, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pool = f"example_{'psql' if language is by_psql else language.__name__}"

    def run(*arguments: str) -> list[str]:
        done = subprocess.run([*client, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    submitted = run("submit")
    assert len(submitted) == _TASKS and all(line.isdecimal() for line in submitted)
    assert db.stats(pool)["max_units"] == 24

    one = subprocess.Popen([*worker, "one"], env=environment, stdout=subprocess.DEVNULL)
    held = wait_for(lambda: _held(db, "one"))
    two = subprocess.Popen([*worker, "two"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        one.kill()
        one.wait()
        lost = [task for task in held if db.rows("select from pgpark.task where task_id = %s", task)]
        results = run("fetch", str(_TASKS))
    finally:
        one.kill()
        two.terminate()
    seen, complaints = two.communicate(timeout=20)
    assert (two.returncode, complaints) == (0, "")
    assert sorted(re.findall(r"^\d+", line)[0] for line in results) == sorted(submitted, key=str)
    assert all("completed" in line and "done" in line for line in results)
    assert lost and all(f"two: task {task}, attempt 2" in seen for task in lost)
    assert db.rows("select * from pgpark.mailbox") == []


def _story(language: str) -> list[str]:
    text = (EXAMPLES / language / "README.md").read_text()
    (block,) = re.findall(r"<!-- the story -->\n```sh\n(.*?)```", text, re.S)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


def _held(db: Database, worker: str) -> list[int]:
    return [row["task_id"] for row in db.rows("select task_id from pgpark.task where worker = %s", worker)]


@pytest.mark.parametrize("language", ["node", "go", "psql"])
def test_the_readme_tells_the_same_story(language: str) -> None:
    said = _story(language)
    order = [next(n for n, line in enumerate(said) if words in line) for words in _STORY]
    assert order == sorted(order)


_STORY = ("submit", " one &", " two &", "kill -9 $one", f"fetch {_TASKS}", "kill $two")
