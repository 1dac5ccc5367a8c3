"""Handlers that do what no handler should. In the worker's own process one may take what runs beside it along; in
processes (--processes) only its own attempt is lost."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.chaos.handlers import VICES
from tests.chaos.lot import Lot

KILLS_THE_WORKER = {"leaks", "exits", "segfaults"}


EVERY = 30  # tasks of which one has the vice


def wicked(vice: str) -> Any:
    """What is added to payloads."""
    return lambda number: {"vice": vice} if number % EVERY == 2 else {}


# One that never returns holds its units until somebody kills its worker: docs/decisions/0004.
@pytest.mark.parametrize("vice", sorted(VICES.keys() - {"never returns"}))
def test_in_the_worker_whatever_a_handler_does_no_task_is_lost(dsn: str, vice: str) -> None:
    lot = Lot(dsn, handler="misbehave", extra=wicked(vice))
    with lot.at_work():
        lot.progress(20)
        found = lot.settle(losses=True)
    assert found["completed"] == found["tasks"]
    assert bool(lot.gone) == (vice in KILLS_THE_WORKER - {"leaks"}), lot.gone


@pytest.mark.parametrize("vice", sorted(VICES))
def test_in_processes_only_the_attempt_itself_is_lost(dsn: str, vice: str) -> None:
    config = {
        "lease_secs": 30,
        "run_timeout_secs": 2.5,
        "retry": {"max_attempts": 3, "max_losses": 1, "backoff_secs": 0},
    }
    lot = Lot(dsn, handler="misbehave", options=("--processes", "3"), workers=1, extra=wicked(vice), config=config)
    with lot.at_work():
        lot.progress(12)
        lot.settle()
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select (payload->>'n')::int, attempt from pgpark.mailbox").fetchall()
    harmed = {number for number, attempt in rows if attempt > 1}
    harmless = vice in {"blocks the loop", "forks"}
    assert harmed == ({number for number, _ in rows if number % EVERY == 2} if not harmless else set())
