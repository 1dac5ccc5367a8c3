"""The handler: sends a request on to the model server, emits what comes as parts, and returns the whole answer.

    LLM_UPSTREAM=http://127.0.0.1:8001 pgpark worker llm --handler worker:run --concurrency 64

A task is {"path": "/v1/chat/completions", "body": {...}}, its result {"status": 200, "body": {...}}. What the server
refuses (4xx) is a result too, for the client to read; what may work next time (no connection, 5xx, 429, an answer that
breaks off) fails the attempt, and the pool's `retry` decides. When the task is cancelled, the connection is closed, and
the server stops and frees its memory.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
from chunks import whole
from pydantic import BaseModel

from pgpark import TaskContext

_LATER = {408, 425, 429}  # and 5xx: may work next time
_MOST_OF_AN_ERROR = 500


class Call(BaseModel):
    """A request to the model server."""

    path: str
    body: dict[str, Any]


class UpstreamError(Exception):
    """The model server could not answer this time."""


async def run(call: Call, context: TaskContext) -> dict[str, Any]:
    """Raises UpstreamError for what may work at the next attempt."""
    try:
        async with _client().stream("POST", call.path, json=call.body) as response:
            if response.status_code >= 500 or response.status_code in _LATER:
                await response.aread()
                raise UpstreamError(f"the server answered {response.status_code}: {response.text[:_MOST_OF_AN_ERROR]}")
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return {"status": response.status_code, "body": _whole(response.status_code, await response.aread())}
            chunks = []
            async for chunk in _chunks(response):
                chunks.append(chunk)
                context.emit(chunk)
                await context.drain()
            return {"status": response.status_code, "body": whole(chunks)}
    except httpx.HTTPError as error:
        raise UpstreamError(f"{type(error).__name__} {error}".strip()) from error


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream, up to [DONE]. Servers tell of an error in the middle in two ways: vLLM and llama.cpp as
    an event that holds an error, Ollama as a line of JSON that is no event."""
    async for line in _lines(response):
        name, _, text = line.partition(b":")
        if name == b"data" and text.strip() == b"[DONE]":
            return
        if name in (b"data", b"error") or line.startswith(b"{"):
            chunk = _json(line if line.startswith(b"{") else text)
            if name != b"data" or not isinstance(chunk, dict) or "error" in chunk:
                raise UpstreamError(f"the server broke off: {json.dumps(chunk)[:_MOST_OF_AN_ERROR]}")
            yield chunk
    raise UpstreamError("the server broke off: its answer ended without [DONE]")


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as an event stream has them. httpx would also cut at U+2028 and its like, which answers may hold."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def _whole(status: int, text: bytes) -> Any:
    """An answer that is no stream; a refusal need not be JSON (a proxy's, say)."""
    try:
        return _json(text)
    except UpstreamError as error:
        if 400 <= status < 500:
            return {"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}}
        raise


def _json(text: bytes) -> Any:
    try:
        found = json.loads(text, parse_constant=lambda _: None)  # a log probability may be -Infinity; JSON has none
    except (ValueError, RecursionError):
        raise UpstreamError(f"the server sent no JSON: {text[:_MOST_OF_AN_ERROR].decode(errors='replace')}") from None
    return _storable(found) if b"\\u" in text else found


def _storable(value: Any) -> Any:
    """With what Postgres cannot keep replaced: NUL characters, and halves of a surrogate pair."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return value


@functools.cache
def _client() -> httpx.AsyncClient:
    """One for all tasks of this worker; how many run at once is the pool's business."""
    key = os.environ.get("LLM_UPSTREAM_KEY")
    return httpx.AsyncClient(
        base_url=os.environ.get("LLM_UPSTREAM", "http://127.0.0.1:8001"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(float(os.environ.get("LLM_UPSTREAM_SILENCE_SECS", "300")), connect=5),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
    )
