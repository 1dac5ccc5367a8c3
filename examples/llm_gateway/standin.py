#!/usr/bin/env python3
"""A small OpenAI-compatible server that really takes the memory that a model server would: its weights when it starts,
and for each request the KV cache of its prompt and max_tokens, by the formula of docs/costs.md. It has a card of a
fixed size; when a request does not fit it dies, as a process does that runs out of memory. The text is made up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pgpark import LlmCostModel

MODEL = "stand-in"
EXIT_OUT_OF_MEMORY = 137  # as a process that the kernel killed
_STEP_SECS = 0.02


class Card:
    """Memory of a fixed size. What is taken is written to, so that it is resident and not only promised."""

    def __init__(self, total_bytes: int, device: str) -> None:
        self.total_bytes, self.device = total_bytes, device
        self.held_bytes = self.peak_bytes = 0

    def limit_process(self) -> None:
        """Lets the system enforce the size of the card from now on."""
        if self.device == "cuda":
            import torch

            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.total_bytes / whole))
        elif sys.platform == "linux":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + self.total_bytes, used + self.total_bytes))

    def take(self, size: int) -> Any:
        """A block of memory. Ends the process, and with it every request, when there is no room for it."""
        try:
            if self.device != "cuda" and sys.platform != "linux" and self.held_bytes + size > self.total_bytes:
                raise MemoryError  # where the system does not enforce the limit
            block = self._cuda(size) if self.device == "cuda" else self._ram(size)
        except (MemoryError, OSError, RuntimeError) as error:  # torch.cuda.OutOfMemoryError is a RuntimeError
            print(
                f"stand-in: out of memory: {size >> 20} MiB wanted, {self.held_bytes >> 20} of"
                f" {self.total_bytes >> 20} MiB held: {error}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_OUT_OF_MEMORY)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return block

    def give_back(self, block: Any, size: int) -> None:
        """Frees a block."""
        if isinstance(block, mmap.mmap):
            block.close()
        self.held_bytes -= size

    @staticmethod
    def _ram(size: int) -> mmap.mmap:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        return block

    @staticmethod
    def _cuda(size: int) -> Any:
        import torch

        return torch.ones(size, dtype=torch.uint8, device="cuda")


class Server:
    """The model: what a request costs, and how fast its tokens come. speed: tokens a second of a request that is alone;
    with 32 at once each gets half of it."""

    def __init__(self, cost: LlmCostModel, card: Card, speed: float, load_secs: float) -> None:
        self.cost, self.card, self.speed = cost, card, speed
        self.running = self.served = self.abandoned = 0
        self._weights = card.take(int((cost.weights_gb or 0) * (1 << 30)))
        time.sleep(load_secs)

    @contextlib.contextmanager
    def cache(self, prompt_tokens: int, max_tokens: int) -> Iterator[None]:
        """Holds the KV cache of a request."""
        size = int(self.cost.units(prompt_tokens, max_tokens) * self.cost.unit_bytes)
        block = self.card.take(size)
        self.running += 1
        try:
            yield
        except BaseException:
            self.abandoned += 1
            raise
        else:
            self.served += 1
        finally:
            self.running -= 1
            self.card.give_back(block, size)

    async def tokens(self, prompt: str, prompt_tokens: int, max_tokens: int) -> AsyncIterator[str]:
        """The answer: between 40 and 100 % of max_tokens, the same for the same prompt, counted up."""
        share = random.Random(hashlib.sha256(prompt.encode()).digest()).uniform(0.4, 1)
        await asyncio.sleep(prompt_tokens / (50 * self.speed))  # reading is quicker than writing
        due = time.monotonic()
        for number in range(1, max(1, round(max_tokens * share)) + 1):
            due += (1 + self.running / 32) / self.speed
            if (pause := due - time.monotonic()) > _STEP_SECS:
                await asyncio.sleep(pause)
            yield f" {number}"


def count_tokens(text: str) -> int:
    """This model's tokenizer: a token for every four bytes."""
    return -(-len(text.encode()) // 4)


def refusal(message: str, status: int = 400, code: str | None = None) -> JSONResponse:
    """An error as OpenAI words it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def create_app(server: Server) -> FastAPI:
    """The endpoints. `/stats` is for who watches: bytes held, and requests that run, were served, were abandoned."""
    app = FastAPI(openapi_url=None)
    numbers = itertools.count(1)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/stats")
    async def stats() -> dict[str, int]:
        card = server.card
        return {"held_bytes": card.held_bytes, "peak_bytes": card.peak_bytes, "total_bytes": card.total_bytes} | {
            name: getattr(server, name) for name in ("running", "served", "abandoned")
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "pgpark"}]}

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        return {"count": count_tokens(str((await request.json())["content"]))}

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await request.json()
        texts = [body["input"]] if isinstance(body.get("input"), str) else body.get("input")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return refusal("input must be a string or a list of strings")
        prompt_tokens = sum(map(count_tokens, texts))
        with server.cache(prompt_tokens, 0):
            await asyncio.sleep(prompt_tokens / (50 * server.speed))
            vectors = [[byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]] for text in texts]
        data = [{"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(vectors)]
        usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
        return JSONResponse({"object": "list", "data": data, "model": MODEL, "usage": usage})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return refusal("messages must be a list that is not empty")
        prompt = "".join(str(message.get("content")) for message in messages)
        return await answer(request, body, prompt, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        return await answer(request, body, str(body.get("prompt")), chat=False)

    async def answer(request: Request, body: dict[str, Any], prompt: str, chat: bool) -> Response:
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 256
        prompt_tokens, reply = count_tokens(prompt), _Reply(next(numbers), chat)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            return refusal(f"max_tokens must be at least 1, not {max_tokens!r}")
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            stream = _events(server, reply, prompt, prompt_tokens, max_tokens, usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        try:
            with server.cache(prompt_tokens, max_tokens):
                words = [word async for word in _unless_gone(request, server.tokens(prompt, prompt_tokens, max_tokens))]
        except ConnectionAbortedError:
            return Response(status_code=499)
        return JSONResponse(reply.whole("".join(words), prompt_tokens, len(words)))

    return app


async def _events(
    server: Server, reply: _Reply, prompt: str, prompt_tokens: int, max_tokens: int, usage: bool
) -> AsyncIterator[str]:
    """A stream as OpenAI sends it. A client that closes the connection ends it, which frees the cache."""
    written = 0
    with server.cache(prompt_tokens, max_tokens):
        if reply.chat:
            yield reply.event(role="assistant", content="")
        async for word in server.tokens(prompt, prompt_tokens, max_tokens):
            written += 1
            yield reply.event(content=word)
    yield reply.event(finish_reason="stop")
    if usage:
        yield reply.event(usage=_usage(prompt_tokens, written))
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, words: AsyncIterator[str]) -> AsyncIterator[str]:
    async for word in words:
        if await request.is_disconnected():
            raise ConnectionAbortedError
        yield word


def _usage(prompt_tokens: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}


class _Reply:
    """The shapes of one answer."""

    def __init__(self, number: int, chat: bool) -> None:
        self.chat = chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{number}", "created": int(time.time()), "model": MODEL}

    def event(self, finish_reason: str | None = None, usage: dict[str, int] | None = None, **delta: str) -> str:
        text: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choices = [] if usage else [{"index": 0, "finish_reason": finish_reason} | text]
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = self._head | {"object": kind, "choices": choices} | ({"usage": usage} if usage else {})
        return f"data: {json.dumps(chunk)}\n\n"

    def whole(self, text: str, prompt_tokens: int, written: int) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._head | {
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [{"index": 0, "finish_reason": "stop"} | said],
            "usage": _usage(prompt_tokens, written),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=Path, default=Path(__file__).with_name("pools.json"))
    parser.add_argument("--pool", default="llm", help="whose cost_model says what model and card this is")
    parser.add_argument("--device", choices=("ram", "cuda"), default="ram", help="cuda: VRAM, through torch")
    parser.add_argument("--speed", type=float, default=60, help="tokens a second (default: %(default)s)")
    parser.add_argument("--load-secs", type=float, default=0.5, help="that loading weights takes")
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    settings = json.loads(arguments.pools.read_text())["pools"][arguments.pool]["cost_model"]
    cost = LlmCostModel.from_config(settings)
    if cost.gpu_vram_total_gb is None:
        parser.error(f"{arguments.pools}: cost_model has no gpu_vram_total_gb")
    card = Card(int(cost.gpu_vram_total_gb * (1 << 30)), arguments.device)
    card.limit_process()
    app = create_app(Server(cost, card, arguments.speed, arguments.load_secs))
    uvicorn.run(app, port=arguments.port, log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
