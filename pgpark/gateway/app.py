"""The gateway as an ASGI application: `create_app(GatewaySettings(dsn))`.

To add routes: write a module with an APIRouter and add it to ROUTERS. Routes get their caller with `Caller`
(caller.py), answer with models, raise the errors of pgpark.errors, and document their statuses with `documented`
(errors.py). Every route wants a token, but for those that guard.py names.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from pgpark import __version__
from pgpark.gateway import health, page, pools, tasks
from pgpark.gateway.connections import Connections
from pgpark.gateway.errors import add_handlers
from pgpark.gateway.guard import Guard
from pgpark.gateway.settings import GatewaySettings

ROUTERS = (health.router, pools.router, tasks.router, page.router)


def create_app(settings: GatewaySettings) -> FastAPI:
    """The gateway of a database. It connects when it is started, and again whenever that is needed."""
    connections = Connections(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await connections.open()
        try:
            yield
        finally:
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
    app.state.draining = False
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Guard, connections=connections, max_body_bytes=settings.max_body_bytes)
    return app
