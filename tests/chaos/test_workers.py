"""Workers that are killed, that share a name, whose clock jumps, and tasks that kill them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.conftest import required
from tests.chaos.lot import Lot


def test_workers_are_killed_at_random(dsn: str, minutes: float) -> None:
    lot = Lot(dsn, workers=3)

    def kill() -> None:
        random.choice(lot.workers).kill()
        lot.events["workers killed"] += 1

    with lot.at_work():
        lot.break_for(minutes, kill)
        lot.settle()


def test_two_workers_of_one_name_lose_nothing(dsn: str, minutes: float) -> None:
    lot = Lot(dsn, workers=0)
    lot.workers = [lot.worker("twin") for _ in range(2)]

    def kill() -> None:
        random.choice(lot.workers).kill()
        lot.events["workers killed"] += 1

    with lot.at_work():
        lot.break_for(minutes, kill)
        lot.settle()


@pytest.mark.parametrize("options", [(), ("--processes", "3")], ids=["in the worker", "in processes"])
def test_a_task_that_kills_whoever_takes_it_is_dropped_and_the_others_go_on(dsn: str, options: tuple[str, ...]) -> None:
    config = {"retry": {"max_attempts": 2, "max_losses": 2, "backoff_secs": 0}, "lease_secs": 1}

    def poison(number: int) -> dict[str, object]:
        return {"vice": "segfaults", "always": True} if number == 3 else {}

    lot = Lot(dsn, handler="misbehave", options=options, submitters=1, extra=poison, config=config)
    with lot.at_work():
        lot.progress(12)
        found = lot.settle(losses=True)
    ending = "failed" if options else "dropped"
    assert 0 < found[ending] <= (1 if options else 9), (
        "what ran beside it twice is lost with it, in processes nothing is"
    )


def test_a_clock_that_jumps_on_the_workers_host(dsn: str, minutes: float, tmp_path: Path) -> None:
    """By hours, forth and back. Leases and deadlines are the server's to judge, and workers wait by a clock that only
    goes on."""
    folder = Path(required("faketime")).parents[1] / "lib"
    library = next(folder.glob("**/faketime/libfaketimeMT.so.1"))
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    lot = Lot(dsn, environment=environment)

    def jump() -> None:
        ahead = random.choice([-7200, -3600, 3600, 7200])
        offset.write_text(f"{ahead:+d}")
        command = [sys.executable, "-c", "import time; print(time.time())"]
        seen = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        assert float(seen.stdout) - time.time() == pytest.approx(ahead, abs=60), "the clock does not jump"
        lot.events["clock jumps"] += 1

    with lot.at_work():
        lot.break_for(minutes, jump)
        lot.settle()
