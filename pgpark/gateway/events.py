"""Live: the parts of a task and its outcome, and the outcomes of a mailbox, as Server-Sent Events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from pgpark import calls
from pgpark.calls import Call
from pgpark.gateway.caller import Caller, CallerOf, PoolName, TaskId
from pgpark.gateway.connections import keyed, page
from pgpark.gateway.errors import documented, unknown_task
from pgpark.gateway.hub import Address
from pgpark.gateway.mailbox import Session, Since, Tenant, User
from pgpark.gateway.requests import Absent
from pgpark.gateway.streams import EventStream, News, event, following
from pgpark.models import Followed

router = APIRouter(tags=["live"])

MaxSecs = Annotated[
    float | Absent, Query(ge=0, le=86400, allow_inf_nan=False, description="End the stream after so many seconds.")
]
_END = "end"
LastPart = Annotated[
    str,
    Header(alias="Last-Event-ID", pattern=f"^([0-9]{{1,9}}|{_END})$", description="Go on after this event."),
]
_NUMBER, _MOST_SEEN = "[0-9]{1,18}", 200  # in a bookmark of park_follow
Bookmark = Annotated[
    str,
    Header(
        alias="Last-Event-ID",
        pattern=f"^({_NUMBER}[.]){{3}}({_NUMBER}(,{_NUMBER}){{0,{_MOST_SEEN - 1}}})?$",
        description="Go on after this event.",
    ),
]
_PAGE_ROWS, _PAGE_BYTES = 100, 256 << 10  # of parts or messages, read when the client has taken those before
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events; data is JSON.", "content": {"text/event-stream": {"schema": _EVENT}}}
}


@router.get(
    "/pools/{pool}/tasks/{task_id}/events",
    response_class=Response,
    responses=documented() | _STREAM | {204: {"description": "This client has had all; it need not come back."}},
)
async def task_events(
    pool: PoolName, task_id: TaskId, caller: Caller, last: LastPart = "", max_secs: MaxSecs = None
) -> Response:
    """The task as it goes: `status` at first and when it has changed; each `part` that it emits, partial results and
    progress; its `outcome`, or `gone` if that was acknowledged; then the stream ends. Ids are the numbers of parts."""
    caller.hub.require_room()
    (known,) = await caller.look(calls.status(task_id))
    if known is None or known.pool != pool:
        raise unknown_task(task_id)
    if last == _END:
        return Response(status_code=204)
    return EventStream(_task(caller, task_id, int(last or 0), max_secs))


@router.get("/mailbox/{tenant}/events", response_class=Response, responses=documented() | _STREAM)
async def mailbox_events(
    tenant: Tenant,
    caller: Caller,
    user: User = None,
    session: Session = None,
    since: Since = None,
    last: Bookmark = "",
    max_secs: MaxSecs = None,
) -> Response:
    """Outcomes of a tenant as they land, each as a `message`: at first those that are in the mailbox already, or, with
    Last-Event-ID, those that came after that event. They stay in the mailbox until they are acknowledged."""
    caller.hub.require_room()
    await caller.look(calls.follow(tenant, last or None, user, session, since, max_messages=1))  # refused now or never
    return EventStream(_mailbox(caller, (tenant, user, session), since, last or None, max_secs))


async def _task(caller: CallerOf, task_id: int, after: int, max_secs: float | None) -> AsyncGenerator[str, None]:
    told: str | None = None
    most = _PAGE_ROWS

    async def look() -> News:
        nonlocal after, told, most
        status, outcome, parts = await caller.look(
            keyed(calls.status(task_id), "status"),
            keyed(calls.result(task_id), "task_id"),  # before the parts, which precede it
            page(lambda rows: calls.parts(task_id, after, rows), "number", most, _PAGE_BYTES),
        )
        events: list[str] = []
        if status and status[0][0] != told and not outcome:
            told = status[0][0]
            events.append(event("status", status[0][1]))
        most = parts.most_rows
        for after, line in parts.rows:
            events.append(event("part", line, str(after)))
        if parts.more:
            return News(events, again_in=0)
        if outcome:
            events.append(event("outcome", outcome[0][1], _END))
        elif not status:
            events.append(event("gone", "{}", _END))
        return News(events, over=bool(outcome) or not status)

    async with caller.hub.task(task_id, parts=True) as watch:
        async for text in following(watch, caller.settings, max_secs, look):
            yield text


async def _mailbox(
    caller: CallerOf,
    address: Address,
    since: datetime | None,
    bookmark: str | None,
    max_secs: float | None,
) -> AsyncGenerator[str, None]:
    most = _PAGE_ROWS
    held_back = 1.0

    async def look() -> News:
        nonlocal bookmark, most, held_back
        (messages,) = await caller.look(page(follow, "bookmark", most, _PAGE_BYTES))
        most = messages.most_rows
        events = []
        for bookmark, line in messages.rows:
            events.append(event("message", line, bookmark))
        held_back = 1.0 if messages.rows else held_back * 2
        if messages.more:
            return News(events, again_in=0)
        full = bookmark is not None and bookmark.count(",") == _MOST_SEEN - 1
        return News(events, again_in=held_back if full else None)  # till whom park_follow waits for has committed

    def follow(rows: int) -> Call[list[Followed]]:
        return calls.follow(address[0], bookmark, address[1], address[2], since, max_messages=rows)

    async with caller.hub.mailbox(address) as watch:
        async for text in following(watch, caller.settings, max_secs, look):
            yield text
