"""The gateway as an ASGI application: `create_app(GatewaySettings(dsn))`.

To add routes: write a module with an APIRouter and add it to ROUTERS. Routes get their caller with `Caller`
(caller.py), answer with models, raise the errors of pgpark.errors, and document their statuses with `documented`
(errors.py). Every route wants a token, but for those that guard.py names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from pgpark import __version__
from pgpark.gateway import events, health, mailbox, metrics, page, pools, tasks, workers
from pgpark.gateway.connections import Connections
from pgpark.gateway.errors import add_handlers
from pgpark.gateway.guard import Guard
from pgpark.gateway.hub import Hub
from pgpark.gateway.settings import GatewaySettings

log = logging.getLogger("pgpark.gateway")

ROUTERS = (
    health.router,
    pools.router,
    tasks.router,
    mailbox.router,
    events.router,
    workers.router,
    metrics.router,
    page.router,
)


def create_app(settings: GatewaySettings) -> FastAPI:
    """The gateway of a database. It connects when it is started, and again whenever that is needed."""
    connections = Connections(settings)
    hub = Hub(connections, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await connections.open()
        work = asyncio.create_task(hub.run())
        work.add_done_callback(_report)
        try:
            yield
        finally:
            hub.stop()
            work.cancel()
            await asyncio.wait({work})
            await connections.close()

    app = FastAPI(
        title="pgpark",
        version=__version__,
        description="A parking lot for expensive work on Postgres.",
        lifespan=lifespan,
        docs_url=None,  # they come from somebody else's servers
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.connections = connections
    app.state.hub = hub
    app.state.metrics = metrics.GatewayMetrics()
    app.state.draining = False
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Guard, connections=connections, max_body_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["Location", "Retry-After"],
        )
    app.state.parameters = _parameters(app.openapi())
    app.add_middleware(metrics.Measured, metrics=app.state.metrics)
    return app


def _parameters(document: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The names of the query's parameters, by path and method."""
    return {
        (path, method.upper()): [given["name"] for given in operation.get("parameters", []) if given["in"] == "query"]
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def _report(work: asyncio.Task[None]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        log.critical("the gateway tells nobody any more", exc_info=error)
