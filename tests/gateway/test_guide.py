"""docs/gateway.md: every example of it, run one after the other, and every route in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import Database
from tests.docs.markdown import ROOT, blocks
from tests.gateway.conftest import Gateway

PAGE = "docs/gateway.md"


def test_the_examples_of_the_guide_work(db: Database, gateway: Gateway, tmp_path: Path) -> None:
    db.pool()
    shell = "".join(block.text for block in blocks(PAGE) if block.language == "sh" and "pip install" not in block.text)
    environment = os.environ | {
        "PGPARK_DSN": db.dsn,
        "URL": gateway.url,
        "TOKEN": gateway.secret(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(["bash", "-euxc", shell], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ('"position":0', '"stop":[]', "event: part", "event: outcome", "event: message", '"acknowledged":2',
                 '"result":"changed"', '"status":"ready"', '"status":"dropped"'):  # fmt: skip
        assert told in done.stdout, told
    assert db.stats()["max_units"] == 32


def test_every_route_is_in_the_guide(gateway: Gateway) -> None:
    text = (ROOT / PAGE).read_text()
    routes = [path for path in gateway.app.openapi()["paths"] if not path.startswith("/page/")]
    missing = [
        path for path in routes if re.sub(r"^/pools/\{pool\}(?=/(heartbeat|parts|finish))", "", path) not in text
    ]
    assert not missing
