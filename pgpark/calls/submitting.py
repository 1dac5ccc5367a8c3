"""Submitting tasks, cancelling them, and trying again; where a task is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from pgpark.calls.call import Call, T, described, many, maybe, one, value_of
from pgpark.errors import BadInputError
from pgpark.models import Submitted, TaskStatus


def submit(
    pool: str,
    payload: Any,
    *,
    priority: str = "normal",
    units: int | None = None,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    deadline: datetime | str | None = None,
    tenant: str | None = None,
    user_id: str | None = None,
    session_id: str | None = None,
    run_at: datetime | str | None = None,
    idempotency_key: str | None = None,
) -> Call[Submitted]:
    """Submits one task; see park_submit. A refusal is returned, not raised.

    `units` are slices of the pool (default 1). Instead of them, `prompt_tokens` and `max_tokens` charge by the pool's
    cost model: park_llm_units, in the same statement. Raises BadInputError for both, or for one of the tokens alone.
    """
    charged: int | Call[int] | None = units
    if prompt_tokens is not None and max_tokens is not None:
        if units is not None:
            raise BadInputError("give units, or prompt_tokens and max_tokens, not both")
        charged = llm_units(pool, prompt_tokens, max_tokens)
    elif prompt_tokens is not None or max_tokens is not None:
        raise BadInputError("prompt_tokens and max_tokens go together")
    return described(
        "park_submit",
        one(Submitted),
        pool=pool,
        payload=Jsonb(payload),
        priority=priority,
        units=charged,
        deadline=deadline,
        tenant=tenant,
        user_id=user_id,
        session_id=session_id,
        run_at=run_at,
        idempotency_key=idempotency_key,
    )


def submit_many(pool: str, tasks: Iterable[Mapping[str, Any]]) -> Call[list[Submitted]]:
    """Submits many tasks, each a mapping with the arguments of `submit` as keys; one row each, in order."""
    return described("park_submit_many", many(Submitted), pool=pool, tasks=Jsonb(list(tasks)))


def llm_units(pool: str, prompt_tokens: int, max_tokens: int) -> Call[int]:
    """Units of a language-model request by the pool's cost model."""
    return described(
        "park_llm_units", value_of("park_llm_units"), pool=pool, prompt_tokens=prompt_tokens, max_tokens=max_tokens
    )


def within_trace(call: Call[T], traceparent: str, tracestate: str | None = None) -> Call[T]:
    """A submit whose tasks carry this W3C trace context. It is set before the function is called, since its first
    argument waits for that, and holds until the transaction ends."""
    first = sql.SQL(
        "case when set_config('pgpark.traceparent', cast({} as text), true) is not null"
        " and set_config('pgpark.tracestate', cast({} as text), true) is not null then cast({} as text) end"
    ).format(*map(sql.Placeholder, ("traceparent", "tracestate", "pool")))
    carried = {"traceparent": traceparent, "tracestate": tracestate or ""}
    return Call(_replaced(call.statement, sql.Placeholder("pool"), first), {**call.parameters, **carried}, call.read)


def _replaced(statement: sql.Composed, part: sql.Composable, by: sql.Composable) -> sql.Composed:
    return sql.Composed(
        [
            by if each == part else _replaced(each, part, by) if isinstance(each, sql.Composed) else each
            for each in statement
        ]
    )


def cancel(task_id: int, reason: str = "cancelled") -> Call[str]:
    """Cancels a task: `dropped`, `cancelling`, `finished` or `unknown`."""
    return described("park_cancel", value_of("park_cancel"), task_id=task_id, reason=reason)


def retry(task_id: int) -> Call[Submitted]:
    """Once more: a task in its backoff parks at once, one that has ended is submitted anew; see park_retry."""
    return described("park_retry", one(Submitted), task_id=task_id)


def status(task_id: int) -> Call[TaskStatus | None]:
    """Where a task is, or None if it is unknown."""
    return described("park_status", maybe(TaskStatus), task_id=task_id)
