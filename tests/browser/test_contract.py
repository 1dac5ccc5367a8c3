"""Our SQL in PGlite: Postgres in WebAssembly, run by Node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.browser.conftest import command


def test_the_sql_contract_holds_in_pglite(packages: Path, script: Path) -> None:
    done = subprocess.run(
        [command("node"), "--test", "--test-reporter=spec", str(Path(__file__).parent / "contract.mjs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PGPARK_SQL": str(script), "PGLITE": str(packages / "@electric-sql/pglite/dist/index.js")},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
