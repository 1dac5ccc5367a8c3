"""A burst of requests of mixed sizes, and clients that send it: some leave before they have their answer, some need it
to begin soon. Knows nothing of pgpark; `Gateway` knows what its HTTP answers mean."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

ATTEMPTS = 3  # as often as the pool's `retry` tries
_FIRST_PAUSE_SECS = 2.0
_PATIENCE_SECS = 120.0
_TOKEN = "lot "  # four bytes: one token of the stand-in


@dataclass(frozen=True)
class Ask:
    """One request. at: seconds from the start. leaves_after, deadline_secs: seconds from then, if at all."""

    number: int
    at: float
    prompt_tokens: int
    max_tokens: int
    leaves_after: float | None
    deadline_secs: float | None

    @property
    def body(self) -> dict[str, Any]:
        content = f"{self.number:03} " + _TOKEN * (self.prompt_tokens - 1)
        messages = [{"role": "user", "content": content}]
        return {"model": "stand-in", "messages": messages, "max_tokens": self.max_tokens, "stream": True}


@dataclass
class Tally:
    """What became of a burst: how many ended how, and when the last one did."""

    ends: Counter[str] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)  # for the first token, of those who got one
    seconds: float = 0.0


def plan(count: int, within_secs: float, seed: int = 1) -> list[Ask]:
    """The same burst for the same seed. One in eight leaves, one in six has a short deadline."""
    chance = random.Random(seed)
    asks = []
    for number in range(count):
        leaves = chance.uniform(0.3, 0.8) if number % 8 == 3 else None
        deadline = chance.uniform(1, 2) if number % 6 == 5 and leaves is None else None
        sizes = chance.choice((25, 75, 200)), chance.choice((25, 75, 150, 250))
        at = within_secs * number / count
        asks.append(Ask(number, at, round(sizes[0] * chance.uniform(0.5, 1)), sizes[1], leaves, deadline))
    return asks


class Direct:
    """Clients of a model server, or of anything that is compatible: they try again when it fails. at_once: how many of
    them are let through at a time."""

    def __init__(self, base_url: str, at_once: int | None = None) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=base_url, timeout=httpx.Timeout(_PATIENCE_SECS), limits=limits)
        self._gate = asyncio.Semaphore(at_once) if at_once else None

    async def run(self, asks: list[Ask]) -> Tally:
        """Sends them all, each at its time."""
        tally, started = Tally(), time.monotonic()

        async def one(ask: Ask) -> None:
            await asyncio.sleep(max(0.0, started + ask.at - time.monotonic()))
            began = time.monotonic()
            tally.ends[await self._one(ask, tally, began)] += 1
            tally.seconds = max(tally.seconds, time.monotonic() - started)

        await asyncio.gather(*map(one, asks))
        return tally

    async def _one(self, ask: Ask, tally: Tally, began: float) -> str:
        sending = asyncio.ensure_future(self._in_turn(ask, tally, began))
        try:
            return await asyncio.wait_for(sending, ask.leaves_after)
        except asyncio.TimeoutError:
            return "left"

    async def _in_turn(self, ask: Ask, tally: Tally, began: float) -> str:
        if self._gate is None:
            return await self.ask(ask, tally, began)
        async with self._gate:
            return await self.ask(ask, tally, began)

    async def ask(self, ask: Ask, tally: Tally, began: float) -> str:
        """Sends a request until it is answered; in vain when no token has come by its deadline."""
        for attempt in range(ATTEMPTS):
            try:
                if await self._beginning(ask, tally, began):
                    return "answered"
            except _TooLateError:
                return "gave up"
            except (httpx.HTTPError, ConnectionError):
                pass
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(_FIRST_PAUSE_SECS * 2**attempt)
        return "failed"

    async def _beginning(self, ask: Ask, tally: Tally, began: float) -> bool:
        """One attempt: whether it was answered to its end."""
        waited = None
        async with self.http.stream("POST", "/v1/chat/completions", json=ask.body) as response:
            lines = response.aiter_lines()
            while True:
                left = None if waited or ask.deadline_secs is None else began + ask.deadline_secs - time.monotonic()
                try:
                    line = await asyncio.wait_for(anext(lines), None if left is None else max(0.0, left))
                except asyncio.TimeoutError:
                    raise _TooLateError from None
                except StopAsyncIteration:
                    return False
                if line == "data: [DONE]":
                    return True
                if line.startswith("data:") and waited is None:
                    waited = time.monotonic() - began
                    tally.waited.append(waited)


class Gateway(Direct):
    """The same clients in front of gateway.py. They need not try again; a deadline is said, and the answer of who
    leaves is kept."""

    async def ask(self, ask: Ask, tally: Tally, began: float) -> str:
        """Sends a request once."""
        options: dict[str, Any] = {"user": f"client-{ask.number}"}
        if ask.deadline_secs is not None:
            options["deadline_secs"] = ask.deadline_secs
        if ask.leaves_after is not None:
            options["on_disconnect"] = "keep"
        first = True
        async with self.http.stream("POST", "/v1/chat/completions", json=ask.body | {"pgpark": options}) as response:
            if response.status_code != 200:
                error = json.loads(await response.aread())["error"]["code"]
                return {"deadline_expired": "expired", "queue_full": "turned away"}.get(error, "failed")
            async for line in response.aiter_lines():
                if line.startswith('data: {"error"'):
                    return "failed"
                if line.startswith("data:") and first:
                    tally.waited.append(time.monotonic() - began)
                    first = False
                if line == "data: [DONE]":
                    return "answered"
        return "failed"

    async def come_back(self, asks: list[Ask]) -> int:
        """Those who left look into the mailbox; how many find their answer."""
        found = 0
        for ask in asks:
            if ask.leaves_after is None:
                continue
            listed = (await self.http.get("/v1/pgpark/mailbox", params={"user": f"client-{ask.number}"})).json()
            for entry in listed["data"]:
                answer = await self.http.get(f"/v1/pgpark/results/{entry['id']}")
                found += answer.status_code == 200 and bool(answer.json()["choices"][0]["message"]["content"])
        return found


class _TooLateError(Exception):
    pass
