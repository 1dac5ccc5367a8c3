"""Tasks: submit, look, cancel."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from psycopg import sql

from pgpark import calls
from pgpark.calls import Call
from pgpark.gateway.caller import Caller, PoolName, TaskId
from pgpark.gateway.errors import GatewayError, documented, unknown_task
from pgpark.gateway.requests import NewTask
from pgpark.models import Submitted, SubmittedTask, TaskStatus

router = APIRouter(tags=["tasks"])

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern="^[!-~]+$",
        description="A second request of the same tenant with the same key gets the first task, not another one.",
    ),
]


@router.post("/pools/{pool}/tasks", status_code=202, responses=documented(409))
async def submit(pool: PoolName, task: NewTask, caller: Caller, response: Response, key: Key = None) -> SubmittedTask:
    """Submits a task."""
    given = task.model_dump(exclude_unset=True)
    if key is not None and given.setdefault("idempotency_key", key) != key:
        raise GatewayError(400, "bad_request", "Idempotency-Key and idempotency_key are not the same")
    submitted, position = await caller.call_all(*_and_position(calls.submit(pool, **given)))
    if not submitted.accepted:
        raise refusal(submitted.reason, pool)
    response.headers["Location"] = f"/pools/{pool}/tasks/{submitted.task_id}"
    return SubmittedTask(**submitted.model_dump(), position=position)


@router.get("/pools/{pool}/tasks/{task_id}", responses=documented())
async def status(pool: PoolName, task_id: TaskId, caller: Caller) -> TaskStatus:
    """Where a task is."""
    found = await caller.call(calls.status(task_id))
    if found is None or found.pool != pool:
        raise unknown_task(task_id)
    return found


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


def _and_position(submit: Call[Submitted]) -> tuple[Call[Submitted], Call[int | None]]:
    """Submits, and looks how many are ahead, in one round trip: the second statement finds the id in a setting."""
    noting = sql.SQL("select s.*, set_config('pgpark.submitted', cast(s.task_id as text), true) from ({}) s")
    looking = sql.SQL(
        "select (select s.position from pgpark.park_status(cast(nullif(current_setting('pgpark.submitted', true), '')"
        " as bigint)) s) as position"
    )

    def first(rows: list[dict[str, Any]]) -> int | None:
        position: int | None = rows[0]["position"]
        return position

    return Call(noting.format(submit.statement), submit.parameters, submit.read), Call(looking.format(), {}, first)
