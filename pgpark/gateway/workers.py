"""Workers that cannot speak Postgres: claim, finish, heartbeat, parts, release."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from pgpark import calls
from pgpark.errors import PgparkError
from pgpark.gateway.caller import Caller, CallerOf, PoolName, object_of
from pgpark.gateway.connections import as_json
from pgpark.gateway.errors import documented
from pgpark.gateway.requests import Emissions, NewClaim, NewHeartbeat, Outcomes, Releases
from pgpark.gateway.streams import unless_gone
from pgpark.models import Claimed, Finished

log = logging.getLogger("pgpark.gateway")
router = APIRouter(tags=["workers"])


class ClaimedTasks(BaseModel):
    """The tasks that the worker holds now."""

    tasks: list[Claimed]


class FinishedTasks(BaseModel):
    """Of each element, in order, whether it counted; false: the attempt was fenced off, and nothing was changed."""

    outcomes: list[Finished]


class ToStop(BaseModel):
    """The tasks that the worker should stop."""

    stop: list[int]


@router.post("/pools/{pool}/claims", responses=documented() | {200: {"model": ClaimedTasks}})
async def claim(pool: PoolName, wanted: NewClaim, caller: Caller) -> Response:
    """Starts what fits, each task with a lease; none if there is nothing, after `wait` seconds.

    If the worker hangs up while it waits, nothing is claimed; if it has left when there is something, that is put back.
    """
    step = as_json(calls.claim(pool, wanted.worker, wanted.max_tasks, wanted.max_units))
    rows = await caller.call(step)
    if not rows and wanted.wait > 0:
        rows = await _claim_later(caller, pool, wanted, step)
        if rows and await caller.request.is_disconnected():
            await _put_back(caller, rows)
    return object_of("tasks", rows)


@router.post("/pools/{pool}/finish", responses=documented())
async def finish(pool: PoolName, ended: Outcomes, caller: Caller) -> FinishedTasks:
    """Ends attempts."""
    elements = [outcome.model_dump(exclude_unset=True) for outcome in ended.outcomes]
    _, rows = await caller.call_all(calls.pools(pool), calls.finish_many(elements))
    return FinishedTasks(outcomes=rows)


@router.post("/pools/{pool}/heartbeat", responses=documented())
async def heartbeat(pool: PoolName, held: NewHeartbeat, caller: Caller) -> ToStop:
    """Renews the leases of these tasks; send it about every third of the pool's lease_secs."""
    return ToStop(stop=await caller.call(calls.heartbeat(pool, held.worker, held.task_ids)))


@router.post("/pools/{pool}/parts", responses=documented())
async def emit(pool: PoolName, emitted: Emissions, caller: Caller) -> FinishedTasks:
    """Tells what tasks have so far: partial results, and progress. Renews their leases, too."""
    elements = [emission.model_dump(exclude_unset=True) for emission in emitted.emissions]
    _, rows = await caller.call_all(calls.pools(pool), calls.emit_many(elements))
    return FinishedTasks(outcomes=rows)


@router.post("/pools/{pool}/release", responses=documented())
async def release(pool: PoolName, given_back: Releases, caller: Caller) -> FinishedTasks:
    """Puts running tasks back in their old place; counts neither as a failure nor as a loss."""
    steps = [calls.release(held.task_id, held.attempt) for held in given_back.tasks]
    _, *accepted = await caller.call_all(calls.pools(pool), *steps)
    ids = (held.task_id for held in given_back.tasks)
    return FinishedTasks(outcomes=[Finished(task_id=i, accepted=a) for i, a in zip(ids, accepted, strict=True)])


async def _claim_later(caller: CallerOf, pool: str, wanted: NewClaim, step: calls.Call[list[str]]) -> list[str]:
    until = time.monotonic() + min(wanted.wait, caller.settings.max_wait_secs)
    async with caller.hub.pool(pool) as watch:
        while True:
            caller.hub.looks(pool, watch)
            (rows,) = await caller.look(step)
            if rows or wanted.max_units is not None:  # there may be more, or something for one with more room
                caller.hub.pass_on(pool)
            left = until - time.monotonic()
            if rows or left <= 0 or caller.hub.stopping:
                return list(rows)
            if await unless_gone(caller.request, watch.wait(min(left, caller.settings.look_secs))) is None:
                return []


async def _put_back(caller: CallerOf, rows: list[str]) -> None:
    held: list[dict[str, Any]] = [json.loads(row) for row in rows]
    with contextlib.suppress(PgparkError):
        await caller.call_all(*(calls.release(task["task_id"], task["attempt"]) for task in held))
        return
    log.warning("a worker left while it claimed: its lease of %d tasks will lapse", len(held))
