#!/usr/bin/env python3
"""An OpenAI-compatible endpoint whose requests are tasks of pgpark: each starts when its memory is free, waits in line
until then, and its answer waits in the mailbox for a client that left. The requests themselves are made by workers
(worker.py). Any number of gateways may run side by side; none holds any state.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import tokens
import uvicorn
from callers import Caller, Keys, Options
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from follow import Follower
from psycopg import sql
from replies import DONE, ApiError, answer, event, interrupted, outcome_error, refused
from starlette.exceptions import HTTPException

from pgpark import AsyncPool, Message, Part, PgparkError, build_pools_async, calls
from pgpark.calls import Call
from pgpark.errors import BadInputError

_LONGEST_WAIT_SECS = 60.0


@dataclass(frozen=True)
class Settings:
    """on_disconnect: what becomes of the task of a client that leaves, where the request does not say: cancel or keep.
    default_max_tokens: for a request that names none. hold_secs: how long a stream may wait for its first token before
    it is begun all the same (until then an error is still an HTTP status). keep_alive_secs: between two signs of life
    of a stream that waits. retry_after_secs: what is told when the lot is full. tokens: estimate, server, or the path
    of a tokenizer.json. max_body_mb: of a request, which is read before anything is known of it."""

    upstream: str = "http://127.0.0.1:8001"
    upstream_key: str | None = None
    on_disconnect: str = "cancel"
    default_max_tokens: int = 512
    hold_secs: float = 20.0
    keep_alive_secs: float = 10.0
    retry_after_secs: float = 5.0
    tokens: str = "estimate"
    max_body_mb: int = 32


@dataclass
class Ticket:
    """A request that was accepted. `ended`: nothing is left to be cancelled."""

    task_id: int
    caller: Caller
    options: Options
    keep: bool
    show_usage: bool
    ended: bool = field(default=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Pgpark-Task": self.caller.handle(self.task_id)}


class Gateway:
    """Requests to tasks, and their parts and outcomes to answers."""

    def __init__(self, pool: AsyncPool, settings: Settings, keys: Keys) -> None:
        self.pool, self.settings, self.keys = pool, settings, keys
        self._follower = Follower(pool)
        key = settings.upstream_key
        self.server = httpx.AsyncClient(
            base_url=settings.upstream, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10
        )
        by_file = settings.tokens not in ("estimate", "server")
        self._count = tokens.from_file(Path(settings.tokens)) if by_file else tokens.estimate
        self._background: set[asyncio.Task[Any]] = set()

    # -- requests --------------------------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions, /v1/completions, /v1/embeddings."""
        caller = self.caller(request)
        body = await _body(request, self.settings.max_body_mb << 20)
        ticket = await self._submit(caller, request, body)
        if body.get("stream"):
            return await self._stream(request, ticket)
        outcome = asyncio.ensure_future(self.pool.result(ticket.task_id))
        if not await _done_before_gone(request, outcome):
            outcome.cancel()
            self._left(ticket)
            return Response(status_code=499)
        message = outcome.result()
        assert message is not None
        return self._delivering(request, answer(message, ticket.headers), ticket, message)

    def caller(self, request: Request) -> Caller:
        """Who asks. Raises ApiError."""
        if (caller := self.keys.caller(request.headers.get("authorization"))) is None:
            raise ApiError(401, "invalid_api_key", "this API key is not known here")
        return caller

    async def _submit(self, caller: Caller, request: Request, body: dict[str, Any]) -> Ticket:
        try:
            options = Options.of(request.headers, body)
            ask = tokens.read(request.url.path, body, self.settings.default_max_tokens)
        except tokens.BadRequestError as error:
            raise ApiError(400, "invalid_value", str(error), param=error.param) from error
        except ValueError as error:
            raise ApiError(400, "invalid_option", str(error), param="pgpark") from error
        if not caller.may_ask_for(options.priority):
            text = f"this key may ask for priority {caller.max_priority} at most"
            raise ApiError(403, "priority_not_allowed", text, kind="permission_error", param="pgpark")
        wishes = body.get("stream_options") or {}
        if not isinstance(wishes, dict):
            raise ApiError(400, "invalid_value", "stream_options must be an object", param="stream_options")
        if body.get("stream"):  # so that the answer in the mailbox tells it; who has not asked does not see it
            body["stream_options"] = wishes | {"include_usage": True}
        try:
            deadline = None if options.deadline_secs is None else await self.pool.run(_in(options.deadline_secs))
            task = await self.pool.submit(
                {"path": request.url.path, "body": body},
                prompt_tokens=await self._prompt_tokens(ask, body),
                max_tokens=ask.max_tokens,
                priority=options.priority,
                deadline=deadline,
                tenant=caller.tenant,
                user_id=options.user,
                session_id=options.session,
                idempotency_key=options.idempotency_key,
            )
        except BadInputError as error:
            raise ApiError(400, "invalid_value", str(error)) from error
        if not task.accepted or task.task_id is None:
            raise refused(task, self.settings.retry_after_secs)
        unsaid = self.settings.on_disconnect if options.idempotency_key is None else "keep"  # it means to come back
        keep = (options.on_disconnect or unsaid) == "keep"
        return Ticket(task.task_id, caller, options, keep, bool(wishes.get("include_usage")))

    async def _prompt_tokens(self, ask: tokens.Ask, body: dict[str, Any]) -> int:
        if self.settings.tokens == "server" and ask.texts:
            counted = await tokens.from_server(self.server, body.get("model"), ask.texts)
            if counted is not None:
                return ask.known + counted
        return ask.known + sum(map(self._count, ask.texts))

    # -- streams ---------------------------------------------------------------------------------------------------

    async def _stream(self, request: Request, ticket: Ticket) -> Response:
        """Waits for the first part, so that what goes wrong before it is an HTTP status; not for ever, because a
        connection that is silent for long is cut somewhere on the way."""
        items = self._follower.follow(ticket.task_id)
        first = asyncio.ensure_future(anext(items))
        held = asyncio.ensure_future(asyncio.wait({first}, timeout=self.settings.hold_secs))
        if not await _done_before_gone(request, held):
            first.cancel()
            self._left(ticket)
            return Response(status_code=499)
        if first.done() and isinstance(message := first.result(), Message):
            return self._delivering(request, answer(message, ticket.headers), ticket, message)
        events = self._events(ticket, items, first)
        return StreamingResponse(events, media_type="text/event-stream", headers=ticket.headers)

    async def _events(
        self, ticket: Ticket, items: AsyncIterator[Part | Message], following: asyncio.Future[Part | Message]
    ) -> AsyncIterator[str]:
        """The chunks as the server sent them. A stream has one beginning: where the answer is begun anew after the
        client has read some of it, it ends with an error."""
        attempt = 0
        try:
            while True:
                if not (await asyncio.wait({following}, timeout=self.settings.keep_alive_secs))[0]:
                    yield ": waiting\n\n"  # a comment, which clients pass over
                    continue
                item = following.result()
                if isinstance(item, Message):
                    ticket.ended = True
                    yield _ending(item)
                    self._delivered(ticket, item)
                    return
                if item.kind == "partial":
                    if attempt not in (0, item.attempt):
                        yield interrupted(ticket.caller.handle(ticket.task_id), ticket.keep).event()
                        return
                    attempt = item.attempt
                    if ticket.show_usage or item.content.get("choices"):
                        yield event(item.content)
                following = asyncio.ensure_future(anext(items))
        except PgparkError as error:
            yield _database(error).event()
        finally:  # also when the client has left; then nothing can be awaited here
            following.cancel()
            if not ticket.ended:
                self._left(ticket)

    # -- who came back -----------------------------------------------------------------------------------------------

    async def result(self, request: Request, handle: str) -> Response:
        """GET /v1/pgpark/results/{handle}: the answer, or how far it is; `?wait=30` waits for it, `?stream=true` sends
        it as a stream from its beginning. It stays in the mailbox until it is deleted, or its time is over."""
        caller = self.caller(request)
        task_id, message = await self._find(caller, handle)
        if request.query_params.get("stream") in ("1", "true"):
            ticket = Ticket(task_id, caller, Options(idempotency_key="-"), keep=True, show_usage=False)
            return await self._stream(request, ticket)
        if message is None and (wait := request.query_params.get("wait")):
            message = await self.pool.result(task_id, min(_seconds(wait), _LONGEST_WAIT_SECS))
        headers = {"X-Pgpark-Task": caller.handle(task_id)}
        if message is not None:
            return answer(message, headers)
        status = await self.pool.status(task_id)
        content = {"id": caller.handle(task_id), "object": "pgpark.task"} | (
            {} if status is None else status.model_dump(mode="json", include={"status", "position", "attempt", "units"})
        )
        return JSONResponse(content, 202, headers | {"Retry-After": "1"})

    async def remove(self, request: Request, handle: str) -> Response:
        """DELETE /v1/pgpark/results/{handle}: takes an answer out of the mailbox, or cancels what has not ended."""
        task_id, message = await self._find(self.caller(request), handle)
        if message is None:
            return JSONResponse({"result": await self.pool.cancel(task_id, "cancelled by its client")}, 202)
        await self.pool.ack([message.message_id])
        return JSONResponse({"result": "deleted"})

    async def mailbox(self, request: Request) -> Response:
        """GET /v1/pgpark/mailbox: what waits for this tenant; `?user=`, `?session=`, `?since=`, `?limit=`."""
        caller, query = self.caller(request), request.query_params
        limit = query.get("limit", "50")
        if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
            raise ApiError(400, "invalid_value", f"limit must be 1 to 1000, not {limit}", param="limit")
        try:
            messages = await self.pool.fetch(
                caller.tenant, query.get("user"), query.get("session"), query.get("since"), int(limit)
            )
        except BadInputError as error:
            raise ApiError(400, "invalid_value", str(error)) from error
        shown = {"task_id", "status", "reason", "user_id", "session_id", "created_at"}
        data = [{"id": caller.handle(m.task_id)} | m.model_dump(mode="json", include=shown) for m in messages]
        return JSONResponse({"object": "list", "data": data})

    async def _find(self, caller: Caller, handle: str) -> tuple[int, Message | None]:
        """A task and its outcome. One that lives is for the key that submitted it, an outcome for all of its tenant.
        Raises ApiError."""
        task_id, own = caller.task_of(handle)
        if task_id is not None:
            message = await self.pool.run(calls.result(task_id))
            if message is not None and (message.tenant, message.pool) == (caller.tenant, self.pool.name):
                return task_id, message
            if message is None and own and await self.pool.status(task_id) is not None:
                return task_id, None
        raise ApiError(404, "result_not_found", f"there is no {handle}, or it was deleted")

    # -- endings -----------------------------------------------------------------------------------------------------

    def _delivering(self, request: Request, response: Response, ticket: Ticket, message: Message) -> Response:
        """An answer that is taken out of the mailbox once it is sent. As a stream, because between its last piece and
        its end it can still be seen whether the client is there."""

        async def whole() -> AsyncIterator[bytes]:
            yield bytes(response.body)
            yield b""  # is sent when most of that has been taken
            if not await request.is_disconnected():
                self._delivered(ticket, message)

        return StreamingResponse(whole(), response.status_code, dict(response.headers))

    def _delivered(self, ticket: Ticket, message: Message) -> None:
        """Takes a message out; not where the client gave an idempotency key, so that it may ask for it again."""
        ticket.ended = True
        if ticket.options.idempotency_key is None:
            self._spawn(self.pool.ack([message.message_id]))

    def _left(self, ticket: Ticket) -> None:
        """The client has gone before it had its answer."""
        ticket.ended = True
        if not ticket.keep:
            self._spawn(self.pool.cancel(ticket.task_id, "its client went away"))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        async def quietly() -> None:
            with contextlib.suppress(PgparkError):  # the mailbox's ttl_secs will see to it
                await work

        task = asyncio.ensure_future(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Waits for what is still under way."""
        await asyncio.gather(*self._background)
        await self.server.aclose()


def create_app(
    pools: str | Path | dict[str, Any], pool: str, settings: Settings, keys: Keys | None = None, dsn: str | None = None
) -> FastAPI:
    """The application. pools, dsn: as of build_pools; the pool must have a cost_model."""
    opened: list[Gateway] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with build_pools_async(pools, dsn=dsn) as named:
            opened.append(Gateway(named[pool], settings, keys or Keys(None)))
            yield
            await opened.pop().close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
        return ApiError(error.status_code, code, str(error.detail)).response(error.headers)

    @app.exception_handler(PgparkError)
    async def pgpark_error(_: Request, error: PgparkError) -> Response:
        return _database(error).response()

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    @app.post("/v1/embeddings")
    async def complete(request: Request) -> Response:
        return await opened[0].complete(request)

    @app.get("/v1/pgpark/mailbox")
    async def mailbox(request: Request) -> Response:
        return await opened[0].mailbox(request)

    @app.get("/v1/pgpark/results/{handle}")
    async def result(request: Request, handle: str) -> Response:
        return await opened[0].result(request, handle)

    @app.delete("/v1/pgpark/results/{handle}")
    async def remove(request: Request, handle: str) -> Response:
        return await opened[0].remove(request, handle)

    @app.get("/v1/models")
    @app.get("/v1/models/{model:path}")
    async def models(request: Request, model: str = "") -> Response:
        opened[0].caller(request)
        if {".", ".."} & set(model.split("/")):  # would lead to what else the server has: its prompts, its metrics
            raise ApiError(404, "model_not_found", f"there is no model {model}", param="model")
        try:
            found = await opened[0].server.get("/v1/models" + (f"/{quote(model)}" if model else ""))
        except httpx.HTTPError as error:
            text = f"the model server cannot be reached: {type(error).__name__}"
            raise ApiError(502, "upstream_failed", text, kind="server_error") from error
        return Response(found.content, found.status_code, media_type=found.headers.get("content-type"))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse((await opened[0].pool.stats()).model_dump(mode="json"))

    return app


async def _done_before_gone(request: Request, work: asyncio.Future[Any]) -> bool:
    """Waits until the work is done; False if the client has left before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
    return work.done()


async def _body(request: Request, most: int) -> dict[str, Any]:
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > most:
            raise ApiError(413, "request_too_large", f"the request is larger than {most >> 20} MiB")
    try:
        body = json.loads(read)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return body


def _ending(message: Message) -> str:
    """What ends a stream that has begun."""
    if (error := outcome_error(message)) is not None:
        return error.event()
    failed = message.payload["status"] >= 400  # the server's own refusal, where nothing was streamed
    return (event(message.payload["body"]) if failed else "") + DONE


def _database(error: PgparkError) -> ApiError:
    return ApiError(503, "database", str(error), kind="server_error", retry_after=1)


def _in(seconds: float) -> Call[Any]:
    """A time by the database's clock."""
    statement = sql.SQL("select clock_timestamp() + make_interval(secs => %(seconds)s) as moment").format()
    return Call(statement, {"seconds": seconds}, lambda rows: rows[0]["moment"])


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        raise ApiError(400, "invalid_value", f"wait must be seconds, not {text}", param="wait") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=Path, default=Path(__file__).with_name("pools.json"))
    parser.add_argument("--pool", default="llm")
    parser.add_argument("--upstream", default=os.environ.get("LLM_UPSTREAM", Settings.upstream))
    parser.add_argument("--keys", type=Path, help="API keys and their tenants; without: one tenant, no keys")
    parser.add_argument("--on-disconnect", choices=("cancel", "keep"), default=Settings.on_disconnect)
    parser.add_argument("--default-max-tokens", type=int, default=Settings.default_max_tokens)
    parser.add_argument("--tokens", default=Settings.tokens, help="estimate, server, or the path of a tokenizer.json")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    settings = Settings(
        upstream=given.upstream,
        upstream_key=os.environ.get("LLM_UPSTREAM_KEY"),
        on_disconnect=given.on_disconnect,
        default_max_tokens=given.default_max_tokens,
        tokens=given.tokens,
    )
    try:
        app = create_app(given.pools, given.pool, settings, Keys(given.keys))
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
