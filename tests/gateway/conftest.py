"""A gateway that serves the test's database on a port of its own, and clients with tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from pgpark.gateway.app import create_app
from pgpark.gateway.protocol import ImpatientProtocol
from pgpark.gateway.settings import GatewaySettings
from tests.conftest import Database, wait_for


class Gateway:
    """A running gateway: `url`, `app`, and clients that carry tokens."""

    def __init__(self, db: Database, settings: GatewaySettings) -> None:
        self._db = db
        self.settings = settings
        self.app = create_app(settings)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, http=ImpatientProtocol, log_level="warning", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._clients = contextlib.ExitStack()
        self._thread.start()
        wait_for(lambda: self.server.started, what="for the gateway")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.server.serve(sockets=[self._socket])

    def secret(self, *kinds: str, **scope: Any) -> str:
        """A new token; scope: arguments of park_create_token."""
        arguments = {"name": f"token {uuid.uuid4().hex}", "kinds": list(kinds or ("admin",))} | scope
        named = ", ".join(f"{name} => %s" for name in arguments)
        return str(self._db.value(f"select pgpark.park_create_token({named})", *arguments.values()))

    def client(self, *kinds: str, secret: str | None = None, **scope: Any) -> httpx.Client:
        """A client with a new token of these kinds (default: admin), or with this one ('': with none)."""
        secret = self.secret(*kinds, **scope) if secret is None else secret
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return self._clients.enter_context(httpx.Client(base_url=self.url, headers=headers, timeout=30))

    def close(self) -> None:
        self._clients.close()
        self._loop.call_soon_threadsafe(self.app.state.hub.stop)
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the gateway does not stop"


@pytest.fixture
def gateways(db: Database) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways on the test's database; arguments are those of GatewaySettings."""
    started: list[Gateway] = []

    def start(**settings: Any) -> Gateway:
        started.append(Gateway(db, dataclasses.replace(GatewaySettings(db.dsn), **settings)))
        return started[-1]

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture
def gateway(gateways: Callable[..., Gateway]) -> Gateway:
    return gateways()


@pytest.fixture
def admin(gateway: Gateway) -> httpx.Client:
    """A client that may do everything."""
    return gateway.client()
