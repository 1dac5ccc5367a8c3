"""Whether the process is alive, and whether it can be of use."""

from __future__ import annotations

from fastapi import APIRouter, Request
from psycopg import sql
from pydantic import BaseModel

from pgpark.calls import Call
from pgpark.errors import NotMigratedError
from pgpark.gateway.errors import ErrorBody, GatewayError

router = APIRouter(tags=["health"])


class State(BaseModel):
    """How it is."""

    status: str


@router.get("/health")
async def health() -> State:
    """Whether the process is alive. Asks nobody."""
    return State(status="alive")


@router.get("/ready", responses={503: {"model": ErrorBody, "description": "Not ready; code says why."}})
async def ready(request: Request) -> State:
    """Whether the database answers and is migrated; 503 also while the gateway is about to stop."""
    if request.app.state.draining:
        raise GatewayError(503, "stopping", "this gateway is about to stop", retry_after=5)
    here = Call(
        sql.SQL("select to_regprocedure('pgpark.park_enter(text)') is not null as here").format(),
        {},
        lambda rows: rows[0]["here"],
    )
    if not await request.app.state.connections.run(here):
        raise NotMigratedError("the database has no pgpark yet, or an older one")
    return State(status="ready")


for _path, _route in (("/health", health), ("/ready", ready)):  # some balancers ask so
    router.add_api_route(_path, _route, methods=["HEAD"], include_in_schema=False)
