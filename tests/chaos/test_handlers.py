"""Handlers that do what no handler should. In the worker's own process one may take what runs beside it along; in
processes (--processes) only its own attempt is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from tests.chaos.handlers import VICES
from tests.chaos.lot import Lot

EVERY = 30  # tasks of a client of which each vice has one


def wicked(vices: list[str]) -> Callable[[int], dict[str, Any]]:
    """What is added to payloads."""
    having = {2 + 5 * place: {"vice": vice} for place, vice in enumerate(vices)}
    return lambda number: having.get(number % EVERY, {})


def test_in_the_worker_whatever_a_handler_does_no_task_is_lost(dsn: str, minutes: float) -> None:
    # One that never returns would hold its units until somebody kills its worker: docs/decisions/0004.
    lot = Lot(dsn, handler="misbehave", extra=wicked(sorted(VICES.keys() - {"never returns"})))
    with lot.at_work():
        lot.break_for(minutes, lambda: lot.progress(30), at_least=1)
        found = lot.settle(losses=True)
    assert found["completed"] == found["tasks"]
    ends = {line.split(":")[0].removeprefix("w0 ").removeprefix("w1 ") for line in lot.gone}
    assert ends == {"ended with 7", "ended with -11"}, "exits and segfaults; leaks end with a kill"


def test_in_processes_only_the_attempt_itself_is_lost(dsn: str, minutes: float) -> None:
    vices = sorted(VICES)
    config = {
        "lease_secs": 30,
        "run_timeout_secs": 8,
        "retry": {"max_attempts": 3, "max_losses": 1, "backoff_secs": 0},
    }
    lot = Lot(dsn, handler="misbehave", options=("--processes", "3"), workers=1, extra=wicked(vices), config=config)
    with lot.at_work():
        lot.break_for(minutes, lambda: lot.progress(30), at_least=1)
        lot.settle()
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select (payload->>'n')::int, attempt from pgpark.mailbox").fetchall()
    harmed = {wicked(vices)(number).get("vice", "none") for number, attempt in rows if attempt > 1}
    assert harmed == {"exits", "leaks", "never returns", "segfaults"}
