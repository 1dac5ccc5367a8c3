"""What stands before every route: a token that is known and within its limit, then a body that is not too large.

Who has no token makes us read no body, and what anybody may see takes none. A token that was seen a moment ago and has
no limit is not looked up here; each call looks it up anyway, in its own transaction, so that one that was revoked is of
no use at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgpark import calls
from pgpark.errors import DatabaseError, PgparkError
from pgpark.gateway.connections import Connections
from pgpark.gateway.errors import GatewayError, from_pgpark, unauthorized

OPEN = ("/", "/health", "/ready", "/openapi.json")  # paths that anybody may see, and all below these:
OPEN_BELOW = ("/page/",)

_LONGEST_TOKEN = 256
_BODY_SECS = 30.0
_KNOWN_SECS = 60.0
_MOST_KNOWN = 10_000


class Guard:
    """ASGI middleware; leaves the hash of the token in scope["state"]["token_hash"]."""

    def __init__(self, app: ASGIApp, connections: Connections, max_body_bytes: int) -> None:
        self._app = app
        self._connections = connections
        self._max_body_bytes = max_body_bytes
        self._turns: dict[str, _Turn] = {}
        self._known: OrderedDict[str, float] = OrderedDict()  # tokens without a limit, and when they were looked up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["path"] in OPEN or scope["path"].startswith(OPEN_BELOW):
            return await self._app(scope, _again(b"", receive), send)
        headers = Headers(scope=scope)
        try:
            token_hash = hashlib.sha256(_token(headers).encode()).hexdigest()
            await self._admit(token_hash)
            _once(headers, scope["query_string"])
            scope.setdefault("state", {})["token_hash"] = token_hash
            body = await self._body(headers, receive)
        except PgparkError as error:
            return await from_pgpark(error).response()(scope, receive, send)
        except GatewayError as error:
            return await error.response()(scope, receive, send)
        except _GoneError:
            return None
        return await self._app(scope, _again(body, receive), send)

    async def _admit(self, token_hash: str) -> None:
        now = time.monotonic()
        if now - self._known.get(token_hash, -_KNOWN_SECS) < _KNOWN_SECS:
            return
        async with self._turn(token_hash):
            if now - self._known.get(token_hash, -_KNOWN_SECS) < _KNOWN_SECS:
                return  # somebody of the same crowd has asked meanwhile
            admission = await self._connections.run(calls.admit(token_hash))
            if admission.admitted and not admission.limited:
                self._known[token_hash] = now
                self._known.move_to_end(token_hash)
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        if not admission.admitted:
            raise GatewayError(
                429, "too_many_requests", "this token has used up its limit", "Retry-After says when to go on.",
                retry_after=admission.retry_after_secs,
            )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _turn(self, token_hash: str) -> AsyncIterator[None]:
        """One request of a token at a time, so that a crowd with one token asks once. When the database has failed one,
        it has failed all who wait behind it: they must not find that out one after the other."""
        turn = self._turns.setdefault(token_hash, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                if turn.failure is not None:
                    raise turn.failure
                yield
        except DatabaseError as error:
            turn.failure = error
            raise
        finally:
            turn.users -= 1
            if self._turns.get(token_hash) is turn and (turn.failure is not None or not turn.users):
                del self._turns[token_hash]

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), _BODY_SECS)
        except asyncio.TimeoutError:
            raise GatewayError(408, "request_timeout", f"the body did not come within {_BODY_SECS:g} s") from None

    async def _read(self, receive: Receive) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> GatewayError:
        return GatewayError(
            413, "body_too_large", f"the body is larger than {self._max_body_bytes} bytes",
            "The gateway's --max-body-kb says how large it may be.", headers={"Connection": "close"},
        )  # fmt: skip


@dataclass
class _Turn:
    """Who is asked for next, of those with one token."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    failure: DatabaseError | None = None


class _GoneError(Exception):
    """The client has left before it had said all."""


def _once(headers: Headers, query: bytes) -> None:
    """What is said twice could be taken for one thing here and for another in a proxy."""
    for name in ("Idempotency-Key", "Last-Event-ID"):
        if len(headers.getlist(name)) > 1:
            raise GatewayError(400, "bad_request", f"more than one {name} header", "Send one.")
    names = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)]
    if len(set(names)) < len(names):
        raise GatewayError(400, "bad_request", "a parameter of the address is there twice", "Give each once.")


def _token(headers: Headers) -> str:
    given = headers.getlist("authorization")
    if len(given) != 1:
        raise unauthorized("no token" if not given else "more than one Authorization header")
    scheme, _, token = given[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise unauthorized("the Authorization header has no bearer token")
    if len(token) > _LONGEST_TOKEN or not token.isascii():
        raise unauthorized()
    return token


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read already, then what follows: that the client leaves."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
