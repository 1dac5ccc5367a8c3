"""`pgpark demo`, the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(dsn: str) -> None:
    command = [sys.executable, "-m", "pgpark", "demo", "--json"]
    done = subprocess.run(command, env=os.environ | {"PGPARK_DSN": dsn}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
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
