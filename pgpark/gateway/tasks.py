"""Tasks: submit, look, cancel, wait for the result."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response
from psycopg import sql
from pydantic import BaseModel, Field

from pgpark import calls, telemetry
from pgpark.calls import Call
from pgpark.gateway.caller import Caller, CallerOf, PoolName, Secs, TaskId, json_response
from pgpark.gateway.connections import keyed
from pgpark.gateway.errors import GatewayError, documented, unknown_task
from pgpark.gateway.requests import TEXT, Absent, NewTask, NewTasks
from pgpark.gateway.streams import unless_gone
from pgpark.models import Message, Submitted, SubmittedTask, TaskStatus

router = APIRouter(tags=["tasks"])

Key = Annotated[
    Annotated[str, Field(min_length=1, max_length=200, pattern="^[!-~]+$")] | Absent,
    Header(
        alias="Idempotency-Key",
        description="A second request of the same tenant with the same key gets the first task, not another one.",
    ),
]
Traceparent = Annotated[str | Absent, Header(description="W3C trace context, which goes with the task to its worker.")]
Tracestate = Annotated[str | Absent, Header(description="Goes with traceparent.")]
Reason = Annotated[str, Query(max_length=1000, pattern=TEXT, description="Why, for the outcome.")]


class SubmittedTasks(BaseModel):
    """What became of each task, in order."""

    tasks: list[Submitted]


class Cancelled(BaseModel):
    """What became of the task."""

    task_id: int
    status: Literal["dropped", "cancelling", "finished"]


@router.post("/pools/{pool}/tasks", status_code=202, responses=documented(409))
async def submit(
    pool: PoolName,
    task: NewTask,
    caller: Caller,
    response: Response,
    key: Key = None,
    traceparent: Traceparent = None,
    tracestate: Tracestate = None,
) -> SubmittedTask:
    """Submits a task."""
    given = task.model_dump(exclude_unset=True)
    if key is not None and task.idempotency_key not in (None, key):
        raise GatewayError(409, "different_keys", "Idempotency-Key and idempotency_key are not the same", "Give one.")
    given["idempotency_key"] = task.idempotency_key if key is None else key
    submitting = telemetry.forwarding(calls.submit(pool, **given), traceparent, tracestate)
    submitted = await caller.call(_with_position(submitting))
    if not submitted.accepted:
        raise refusal(submitted.reason, pool)
    response.headers["Location"] = f"/pools/{pool}/tasks/{submitted.task_id}"
    return submitted


@router.get("/pools/{pool}/tasks/{task_id}", responses=documented())
async def status(pool: PoolName, task_id: TaskId, caller: Caller) -> TaskStatus:
    """Where a task is."""
    found = await caller.call(calls.status(task_id))
    if found is None or found.pool != pool:
        raise unknown_task(task_id)
    return found


@router.post("/pools/{pool}/tasks:batch", status_code=202, responses=documented(409))
async def submit_many(
    pool: PoolName,
    tasks: NewTasks,
    caller: Caller,
    key: Key = None,
    traceparent: Traceparent = None,
    tracestate: Tracestate = None,
) -> SubmittedTasks:
    """Submits several tasks, in one transaction. 202 if any was accepted; which were not, and why, their rows say."""
    elements = [task.model_dump(mode="json", exclude_unset=True) for task in tasks.tasks]
    if key is not None:
        for place, element in enumerate(elements, start=1):
            if element.get("idempotency_key") is None:
                element["idempotency_key"] = f"{key}/{place}"
    submitting = telemetry.forwarding(calls.submit_many(pool, elements), traceparent, tracestate)
    rows = await caller.call(submitting)
    if not any(row.accepted for row in rows):
        raise refusal(rows[0].reason, pool)
    return SubmittedTasks(tasks=rows)


@router.delete("/pools/{pool}/tasks/{task_id}", responses=documented())
async def cancel(pool: PoolName, task_id: TaskId, caller: Caller, reason: Reason = "cancelled") -> Cancelled:
    """Cancels a task. dropped: it was waiting; cancelling: its worker is told to stop; finished: too late."""
    known = await caller.call(calls.status(task_id))
    if known is None or known.pool != pool:
        raise unknown_task(task_id)
    outcome = await caller.call(calls.cancel(task_id, reason))
    if outcome == "unknown":
        raise unknown_task(task_id)
    return Cancelled.model_validate({"task_id": task_id, "status": outcome})


@router.get(
    "/pools/{pool}/tasks/{task_id}/result",
    responses=documented() | {200: {"model": Message}, 202: {"model": TaskStatus, "description": "Not yet."}},
)
async def result(pool: PoolName, task_id: TaskId, caller: Caller, wait: Secs = 0.0) -> Response:
    """The outcome of a task. wait: seconds to wait for it; then, or when the gateway stops, 202 and its status."""
    until = time.monotonic() + min(wait, caller.settings.max_wait_secs)
    found, status_ = await _look(caller, pool, task_id)
    if found is None and wait > 0:
        async with caller.hub.task(task_id) as watch:
            while True:
                found, status_ = await _look(caller, pool, task_id)
                left = until - time.monotonic()
                if found is not None or left <= 0 or caller.hub.stopping:
                    break
                if await unless_gone(caller.request, watch.wait(min(left, caller.settings.look_secs))) is None:
                    return Response(status_code=202)  # which nobody reads
    if found is not None:
        return json_response(found)
    return json_response(status_, 202, {"Retry-After": "1"})


async def _look(caller: CallerOf, pool: str, task_id: int) -> tuple[str | None, str]:
    ended, live = await caller.look(keyed(calls.result(task_id), "pool"), keyed(calls.status(task_id), "pool"))
    if not live or live[0][0] != pool:
        raise unknown_task(task_id)
    return ended[0][1] if ended else None, live[0][1]


def refusal(reason: str | None, pool: str) -> GatewayError:
    """Why a task was refused."""
    message, hint, retry_after, status = {
        "queue_full": ("as many tasks wait as the pool takes", "Try again later.", 2.0, 409),
        "pool_closed": ("the pool accepts nothing now", "It is draining or disabled.", 30.0, 409),
        "too_large": ("it needs more units than the pool or its tenant could ever give", "See max_units.", None, 409),
        "deadline_expired": ("it could not start before its deadline", "Give a later deadline.", None, 409),
        "payload_too_large": ("the payload is larger than the pool takes", "See max_payload_kb.", None, 413),
    }.get(reason or "", (f"refused: {reason}", "", None, 409))
    return GatewayError(status, reason or "refused", f"pool {pool}: {message}", hint, retry_after=retry_after)


def _with_position(submit: Call[Submitted]) -> Call[SubmittedTask]:
    """Submits, and looks how many are ahead, in one statement."""
    statement = sql.SQL("select s.*, t.position from ({}) s left join lateral pgpark.park_status(s.task_id) t on true")
    return Call(
        statement.format(submit.statement), submit.parameters, lambda rows: SubmittedTask.model_validate(rows[0])
    )
