"""What a worker does: it claims tasks, tells that it is alive, emits parts, and ends attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg.types.json import Jsonb

from pgpark.calls.call import Call, described, many, value_of
from pgpark.models import Claimed, Finished, Trace


def claim(pool: str, worker: str, max_tasks: int = 1, max_units: int | None = None) -> Call[list[Claimed]]:
    """Starts what fits; see park_claim. `max_units` is the worker's whole capacity."""
    return described("park_claim", many(Claimed), pool=pool, worker=worker, max_tasks=max_tasks, max_units=max_units)


def heartbeat(pool: str, worker: str, task_ids: Sequence[int]) -> Call[list[int]]:
    """Renews the leases of these tasks and returns the ids that the worker should stop."""
    return described(
        "park_heartbeat",
        lambda rows: [row["park_heartbeat"] for row in rows],
        pool=pool,
        worker=worker,
        task_ids=list(task_ids),
    )


def traces(task_ids: Sequence[int]) -> Call[list[Trace]]:
    """The trace contexts of these live tasks; no row for one without."""
    return described("park_traces", many(Trace), task_ids=list(task_ids))


def emit(task_id: int, attempt: int, parts: Sequence[Mapping[str, Any]], first: int | None = None) -> Call[bool]:
    """Emits parts, each a mapping with content and optionally kind; False means that the attempt was fenced off.

    first: the place of the first of them among all of the attempt, from 1; makes the call safe to repeat.
    """
    return described(
        "park_emit", value_of("park_emit"), task_id=task_id, attempt=attempt, parts=Jsonb(list(parts)), first=first
    )


def emit_many(emissions: Sequence[Mapping[str, Any]]) -> Call[list[Finished]]:
    """Emits for many tasks; each a mapping with task_id, attempt, parts, and optionally first."""
    return described("park_emit_many", many(Finished), emissions=Jsonb(list(emissions)))


def finish(
    task_id: int, attempt: int, status: str = "completed", result: Any = None, reason: str | None = None
) -> Call[bool]:
    """Ends an attempt; False means that it was fenced off and nothing changed."""
    return described(
        "park_finish",
        value_of("park_finish"),
        task_id=task_id,
        attempt=attempt,
        status=status,
        result=None if result is None else Jsonb(result),
        reason=reason,
    )


def finish_many(outcomes: Sequence[Mapping[str, Any]]) -> Call[list[Finished]]:
    """Ends many attempts; each a mapping with task_id, attempt, and optionally status, result, reason."""
    return described("park_finish_many", many(Finished), outcomes=Jsonb(list(outcomes)))


def release(task_id: int, attempt: int) -> Call[bool]:
    """Puts a running task back in its old place; False means that the attempt was fenced off."""
    return described("park_release", value_of("park_release"), task_id=task_id, attempt=attempt)
