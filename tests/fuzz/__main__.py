"""The command line of the fuzz. Exit status: 0 without, 1 with findings.

Without --dsn it runs on an embedded server of its own; with it, in a database that it makes there and drops again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.fuzz.runner import Plan, fuzz
from tests.soak.__main__ import database, say


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="See tests/fuzz/__init__.py.")
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_TEST_DSN"), help="a server where databases can be made")
    parser.add_argument("--calls", type=int, default=100_000, help="of functions, commands and parsers together")
    parser.add_argument("--connections", type=int, default=Plan.connections)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    given = parser.parse_args()
    plan = Plan.of(given.calls, connections=given.connections, seed=given.seed)
    with database(given.dsn) as made, tempfile.TemporaryDirectory() as folder:
        report = fuzz(made, plan, Path(folder), say)
    sys.stdout.write(f"{report}\n")
    return 1 if report.findings.counts else 0


if __name__ == "__main__":
    sys.exit(main())
