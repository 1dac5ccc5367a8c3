"""The live page at `/`, and what it asks for: the picture of a pool, and a task once more.

The page is a few files beside this module, sent as they are. Its policy lets it load nothing from anywhere else, run no
script but its own files, and make no HTML out of text.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, Field

from pgpark import calls
from pgpark.gateway.caller import Caller, CallerOf, PoolName, TaskId, json_response
from pgpark.gateway.errors import GatewayError, documented, from_status, unknown_task
from pgpark.gateway.tasks import refusal
from pgpark.models import HistoryStep, Submitted

router = APIRouter(tags=["page"])

_FOLDER = Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

Seen = Annotated[str | None, Header(alias="If-None-Match", include_in_schema=False)]
MaxTasks = Annotated[int, Query(ge=1, le=1000, description="The longest that a list may be.")]


Period = Annotated[int, Query(ge=60, le=172_800, description="Seconds back from now.")]
Step = Annotated[int, Query(ge=60, le=172_800, multiple_of=60, description="Seconds of a step; whole minutes.")]


class Lots(BaseModel):
    """Each pool that the caller may see in a few numbers; see park_lot."""

    at: str
    pools: list[dict[str, Any]]


class Lot(BaseModel):
    """The picture of a pool; see park_lot."""

    pool: str
    at: str
    state: str
    own: list[str] | None = Field(description="The tenants whose tasks alone are shown; null: all.")
    may: dict[str, bool]
    settings: dict[str, Any]
    used_units: int
    running: dict[str, Any]
    parked: dict[str, Any]
    delayed: dict[str, Any]
    line: dict[str, Any]
    tenants: list[dict[str, Any]]
    workers: dict[str, Any] | None
    mailbox: dict[str, Any]
    outcomes: dict[str, int] | None


class History(BaseModel):
    """What a pool did lately; see park_history."""

    pool: str
    steps: list[HistoryStep]


@router.get("/lots", response_model=Lots, responses=documented())
async def lots(caller: Caller) -> Response:
    """Each pool in a few numbers, at the same cost however much waits."""
    return await _picture(caller, None, 1)


@router.get("/pools/{pool}/lot", response_model=Lot, responses=documented())
async def lot(pool: PoolName, caller: Caller, max_tasks: MaxTasks = 100) -> Response:
    """All that is drawn of a pool: what runs, what waits and why, and the latest outcomes."""
    return await _picture(caller, pool, max_tasks)


@router.get("/pools/{pool}/history", responses=documented())
async def history(pool: PoolName, caller: Caller, period: Period = 3600, step: Step = 60) -> History:
    """What the pool did lately, a row for each step, the oldest first: starts, outcomes, waits and runs."""
    return History(pool=pool, steps=await caller.call(calls.history(pool, period, step)))


@router.post("/pools/{pool}/tasks/{task_id}/retry", status_code=202, responses=documented(409))
async def retry(pool: PoolName, task_id: TaskId, caller: Caller) -> Submitted:
    """Once more: a task in its backoff parks at once; one that ended without being completed is submitted anew."""
    known = await caller.call(calls.status(task_id))
    if known is None or known.pool != pool:
        raise unknown_task(task_id)
    submitted = await caller.call(calls.retry(task_id))
    if submitted.accepted:
        return submitted
    message, hint = {
        "completed": ("it has completed", "Submit it anew, if it should run again."),
        "not_ended": ("it has not ended", "Only a task that failed before, or has ended, is tried again."),
        "payload_gone": ("its payload is not kept", "A pool with archive: true keeps payloads of ended tasks."),
    }.get(submitted.reason or "", ("", ""))
    if submitted.reason == "unknown":
        raise unknown_task(task_id)
    if message:
        raise GatewayError(409, submitted.reason or "refused", f"task {task_id} is not tried again: {message}", hint)
    raise refusal(submitted.reason, pool)


@router.get("/", include_in_schema=False)
async def page(seen: Seen = None) -> Response:
    """The live page."""
    return _file("index.html", seen)


@router.get("/page/{name}", include_in_schema=False)
async def file(name: str, seen: Seen = None) -> Response:
    """A file of the page."""
    return _file(name, seen)


async def _picture(caller: CallerOf, pool: str | None, max_tasks: int) -> Response:
    picture = await caller.call(calls.lot_text(pool, max_tasks))
    return json_response(picture, headers={"Cache-Control": "no-store"})


def _file(name: str, seen: str | None) -> Response:
    found = _files().get(name)
    if found is None:
        raise from_status(404)
    body, tag = found
    if seen == tag:
        return Response(status_code=304, headers=_HEADERS | {"ETag": tag})
    return Response(body, headers=_HEADERS | {"ETag": tag}, media_type=_KINDS[Path(name).suffix])


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """The files of the page by name, each with its tag. Nothing else can be asked for."""
    bodies = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _KINDS}
    return {name: (body, f'"{hashlib.sha256(body).hexdigest()[:32]}"') for name, body in bodies.items()}
