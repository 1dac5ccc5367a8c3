"""The examples that need nothing but a database. (examples/embed runs a real model and is run by hand.)"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import Database, psql

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_whole_path_runs_from_psql_and_leaves_nothing_behind(db: Database) -> None:
    command = [psql(), "-X", "-v", "ON_ERROR_STOP=1", "-f", str(EXAMPLES / "any_language.sql"), db.dsn]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert db.rows("select * from pgpark.park_pools()") == []
    assert db.value("select count(*) from pgpark.task") == 0
