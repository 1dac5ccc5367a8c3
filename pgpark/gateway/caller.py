"""Who calls: what a route uses to call SQL functions, as the token that the request carries.

@router.get("/pools/{pool}/something", responses=documented())
async def something(pool: PoolName, caller: Caller) -> Something:
    return await caller.call(calls.something(pool))
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request, Response
from fastapi.security import HTTPBearer

from pgpark.calls import Call
from pgpark.gateway.connections import Connections
from pgpark.gateway.errors import GatewayError
from pgpark.gateway.hub import Hub
from pgpark.gateway.requests import MOST_ID
from pgpark.gateway.settings import GatewaySettings

T = TypeVar("T")

# For /openapi.json; it is Guard who looks.
_documented = HTTPBearer(auto_error=False, description="A token made with `pgpark token create`.")

PoolName = Annotated[str, Path(pattern="^[a-z0-9_]{1,40}$", description="Name of a pool.")]
Secs = Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)]
TaskId = Annotated[int, Path(ge=1, le=MOST_ID, description="Id of a task.")]


class CallerOf:
    """Calls SQL functions as the token of a request; raises the errors of pgpark.errors, which become answers."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.settings: GatewaySettings = request.app.state.settings
        self.hub: Hub = request.app.state.hub
        self._connections: Connections = request.app.state.connections
        self._token_hash: str = request.state.token_hash

    async def call(self, call: Call[T]) -> T:
        """Runs a call of pgpark.calls."""
        return await self._connections.run(call, self._token_hash)

    async def call_all(self, *steps: Call[Any]) -> list[Any]:
        """Runs several in one transaction and one round trip."""
        return await self._connections.run_all(steps, self._token_hash)

    async def look(self, *steps: Call[Any]) -> list[Any]:
        """The same for a caller that waits for something: leaves connections for others."""
        return await self._connections.look(steps, self._token_hash)


async def _caller(request: Request, _token: Annotated[Any, Depends(_documented)]) -> CallerOf:
    known = request.app.state.parameters[request.scope["route"].path, request.method]
    for name in request.query_params:
        if name not in known:
            hint = f"There are: {', '.join(known)}" if known else "There are none"
            raise GatewayError(400, "bad_request", f"there is no parameter {name!r} here", f"{hint}.")
    return CallerOf(request)


Caller = Annotated[CallerOf, Depends(_caller)]


def object_of(key: str, lines: list[str]) -> Response:
    """{key: [rows as JSON text]} as a response."""
    return json_response(f'{{"{key}":[{",".join(lines)}]}}')


def json_response(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON text as a response."""
    return Response(text, status, headers, media_type="application/json")
