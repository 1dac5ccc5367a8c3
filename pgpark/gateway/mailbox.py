"""Mailboxes: outcomes of a tenant."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel

from pgpark import calls
from pgpark.calls import Call
from pgpark.gateway.caller import Caller, object_of
from pgpark.gateway.connections import page
from pgpark.gateway.errors import documented
from pgpark.gateway.requests import TEXT, Absent, Acknowledged, Address, Time
from pgpark.models import Message

router = APIRouter(tags=["mailbox"])
_MOST_BYTES = 4 << 20  # of one answer

Tenant = Annotated[str, Path(min_length=1, max_length=255, pattern=TEXT, description="Whose mailbox it is.")]
User = Annotated[Address | Absent, Query(description="Only this user's.")]
Session = Annotated[Address | Absent, Query(description="Only this session's.")]
Since = Annotated[Time | Absent, Query(description="Only those that landed at this time or later.")]


class Messages(BaseModel):
    """Outcomes, oldest first."""

    messages: list[Message]


class Taken(BaseModel):
    """How many messages were taken out."""

    acknowledged: int


@router.get("/mailbox/{tenant}", responses=documented() | {200: {"model": Messages}})
async def fetch(
    tenant: Tenant,
    caller: Caller,
    user: User = None,
    session: Session = None,
    since: Since = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """Outcomes of a tenant, oldest first; fewer than `limit`, but at least one, where they are large (4 MiB together).
    They stay until they are acknowledged."""

    def messages(most: int) -> Call[list[Message]]:
        return calls.fetch(tenant, user, session, since, most)

    found = await caller.call(page(messages, "message_id", limit, _MOST_BYTES))
    return object_of("messages", [line for _, line in found.rows])


@router.post("/mailbox/{tenant}/ack", responses=documented())
async def acknowledge(tenant: Tenant, ids: Acknowledged, caller: Caller) -> Taken:
    """Takes messages out, with their parts; those that are not there, or that the token may not see, do not count."""
    _, taken = await caller.call_all(calls.fetch(tenant, max_messages=1), calls.ack(ids.message_ids))
    return Taken(acknowledged=taken)
