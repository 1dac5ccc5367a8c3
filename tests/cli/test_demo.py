"""`pgpark demo`, the whole of it, on each kind of queue and mailbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

KINDS = (
    ("postgres_pgmq", "postgres"),
    ("in_memory", "in_memory"),
    ("postgres_custom", "postgres"),
    ("yaque", "in_memory"),
)


@pytest.mark.slow
def test_the_demo_shows_what_it_promises_on_every_backend(empty_databases: Callable[[], str]) -> None:
    """All at once: they mostly sleep."""
    demos = []
    for queue, mailbox in KINDS:
        command = [sys.executable, "-m", "pgpark", "demo", "--json", "--queue", queue, "--mailbox", mailbox]
        environment = os.environ | {"PGPARK_DSN": empty_databases()}
        demos.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for demo in demos:
        printed, complaints = demo.communicate(timeout=120)
        assert demo.returncode == 0, complaints
        told = json.loads(printed)
        assert told["submitted"] >= 60
        assert told["max_units"] == 24
        assert 16 < told["most_units"] <= 24
        assert sum(told["outcomes"].values()) == told["submitted"] == sum(told["mailbox"].values())
        assert told["outcomes"]["expired"] > 0
        assert len(told["mailbox"]) == 3
        assert told["held_when_killed"] > 0
        assert sum(told["inherited"].values()) == told["held_when_killed"], (
            "what the killed worker held has ended elsewhere"
        )
        assert told["inherited"]["completed"] > 0, "by the other worker"
        waits = {row["priority"]: row["median_secs"] for row in told["waits"]}
        assert waits["critical"] < waits["low"]
