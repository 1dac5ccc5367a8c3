"""Running a gateway as a process: binding, a token for the one who started it, and stopping without breaking anything.

On SIGTERM /ready says 503 first, so that a load balancer sends nobody any more; then streams end with a hint when to
come back, running requests finish, and the process ends. On SIGINT, or a second signal, it does not wait so long.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
import uvicorn
from fastapi import FastAPI

from pgpark import calls
from pgpark.database import connect, require_migrated
from pgpark.errors import BadInputError, NotGrantedError, PgparkError, one_line
from pgpark.gateway.app import create_app
from pgpark.gateway.protocol import ImpatientProtocol
from pgpark.gateway.settings import GatewaySettings

log = logging.getLogger("pgpark.gateway")

_LOCAL = "local-"  # how the names of tokens begin that a gateway makes for whoever started it
_LOCAL_SECS = 24 * 3600
_REVOKE_SECS = 5  # that stopping waits for a database that is busy
_FINISH_SECS = 30  # that requests get which are under way


@dataclass(frozen=True)
class ServerSettings:
    """Where a gateway is reached. drain_secs: between saying that it is not ready and accepting nothing any more."""

    host: str = "127.0.0.1"
    port: int = 8080
    local_token: bool = True
    drain_secs: float = 3.0


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, settings: ServerSettings, started: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=2048,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_FINISH_SECS,
        )
        super().__init__(config)
        self._gateway = app
        self._drain_secs = settings.drain_secs
        self._when_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._when_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _told_to_stop(self, number: int) -> None:
        at_once = number == signal.SIGINT or self._gateway.state.draining
        self._gateway.state.draining = True
        log.info("stopping%s", "" if at_once else f" in {self._drain_secs:g} s; not ready from now on")
        asyncio.get_running_loop().call_later(0 if at_once else self._drain_secs, self._stop)

    def _stop(self) -> None:
        self._gateway.state.hub.stop()
        self.should_exit = True


def serve(gateway: GatewaySettings, server: ServerSettings, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. tell: gets the URL to open, once it can be opened.

    Raises BadInputError where it cannot be bound, NotMigratedError, DatabaseError.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of each stranger who does not speak HTTP
    with contextlib.closing(connect(gateway.dsn)) as connection:
        require_migrated(connection)
    with _bound(server) as listening, _local_token(gateway.dsn, server) as token:
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

        def started() -> None:
            tell(f"{url}#token={token}" if token else url)

        _Server(create_app(gateway), server, started).run(sockets=[listening])


def _bound(settings: ServerSettings) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError, OverflowError) as error:
        raise BadInputError(f"cannot listen on {settings.host}:{settings.port}: {one_line(error)}") from error


@contextlib.contextmanager
def _local_token(dsn: str, settings: ServerSettings) -> Iterator[str | None]:
    """A token for whoever started a gateway that only this machine can reach, if nobody has made one."""
    name = f"{_LOCAL}{secrets.token_hex(4)}"
    token = _make_local_token(dsn, name) if settings.local_token and _only_here(settings.host) else None
    try:
        yield token
    finally:
        if token is not None:
            try:
                with contextlib.closing(connect(dsn)) as connection, connection.transaction():
                    connection.execute(f"set local statement_timeout = '{_REVOKE_SECS}s'")
                    calls.run_on(connection, calls.revoke_token(name))
            except PgparkError as error:
                log.warning("the local token was not revoked, and expires by itself: %s", one_line(error))


def _make_local_token(dsn: str, name: str) -> str | None:
    try:
        with contextlib.closing(connect(dsn)) as connection:
            if any(not token.name.startswith(_LOCAL) for token in calls.run_on(connection, calls.tokens())):
                log.info("there are tokens already: none is made for the page; pgpark token create NAME --as admin")
                return None
            row = connection.execute("select pgpark._now() + %s * interval '1 second' as at", [_LOCAL_SECS]).fetchone()
            assert row is not None
            return calls.run_on(connection, calls.create_token(name, ["admin"], expires_at=row["at"]))
    except (NotGrantedError, psycopg.errors.InsufficientPrivilege) as error:
        log.info("no local token: %s", one_line(error))
        return None


def _only_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
