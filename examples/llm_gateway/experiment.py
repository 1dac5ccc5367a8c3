#!/usr/bin/env python3
"""Sends one burst of requests to a server with too little memory for all of them at once, in three ways: all at once,
so many at a time as are safe if all were the largest, and through pgpark. Prints what became of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from burst import Ask, Direct, Gateway, Tally, plan
from standin import EXIT_OUT_OF_MEMORY, count_tokens

from pgpark import LlmCostModel

HERE = Path(__file__).resolve().parent
_START_SECS = 60.0
_LOOK_SECS = 0.005


@dataclass
class Outcome:
    """A row of the table. Memory is what the kernel says was resident, less what the server has without a model."""

    way: str
    answered: int
    fetched_later: int
    left_without: int
    too_late: int
    failed: int
    crashes: int
    peak_mib: int
    median_wait_secs: float
    seconds: float


class Supervised:
    """The stand-in, started again whenever it dies, as an init system does."""

    def __init__(self, pools: Path, speed: float, load_secs: float) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.crashes = self.peak_bytes = 0
        options = [
            "--pools",
            str(pools),
            "--port",
            str(self.port),
            "--speed",
            f"{speed}",
            "--load-secs",
            f"{load_secs}",
        ]
        self._command = [sys.executable, str(HERE / "standin.py"), *options]
        self._weights = 0
        self._closing = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Supervised:
        wait_until_up(self.url)
        held = httpx.get(f"{self.url}/stats").json()["held_bytes"]
        self._without_model = resident(self._process.pid) - held
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stderr=subprocess.DEVNULL)

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_SECS):
            if (code := self._process.poll()) is not None:
                self.crashes += code == EXIT_OUT_OF_MEMORY
                self._process = self._start()
            self.peak_bytes = max(self.peak_bytes, resident(self._process.pid) - self._without_model)


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 where nobody tells."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def wait_until_up(url: str) -> None:
    """Waits for /health. Raises TimeoutError."""
    until = time.monotonic() + _START_SECS
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody answers at {url}")


@contextlib.contextmanager
def served(pools: Path, upstream: str, dsn: str | None, workers: int) -> Iterator[str]:
    """The gateway and its workers as processes of their own; the URL of the gateway. dsn: None: an embedded server."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-gateway-"))
        environment = os.environ | {"PGPARK_POOLS": str(pools), "PGPARK_HOME": home, "LLM_UPSTREAM": upstream}
        environment |= {"PGPARK_DSN": dsn} if dsn else {}
        subprocess.run(
            [sys.executable, "-m", "pgpark", "apply", str(pools)], env=environment, check=True, stdout=sys.stderr
        )
        port = free_port()
        work = ["-m", "pgpark", "worker", "llm", "--handler", "worker:run", "--concurrency", "64", "--grace", "0"]
        commands = [[str(HERE / "gateway.py"), "--pools", str(pools), "--port", str(port)], *[work] * workers]
        for command in commands:
            process = subprocess.Popen([sys.executable, *command], env=environment, cwd=HERE, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        wait_until_up(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"


async def directly(server: Supervised, asks: list[Ask], at_once: int | None) -> Outcome:
    """The burst straight to the server."""
    clients = Direct(server.url, at_once)
    async with clients.http:
        tally = await clients.run(asks)
    way = "all at once" if at_once is None else f"{at_once} at a time"
    return _outcome(way, server, tally, 0)


async def through_pgpark(server: Supervised, asks: list[Ask], gateway: str) -> Outcome:
    """The burst through the gateway; then those who left come back."""
    clients = Gateway(gateway)
    async with clients.http:
        tally = await clients.run(asks)
        while await _unfinished(clients.http):  # what those who left have kept
            await asyncio.sleep(0.05)
        return _outcome("through pgpark", server, tally, await clients.come_back(asks))


async def _unfinished(http: httpx.AsyncClient) -> int:
    stats = (await http.get("/health")).json()
    return int(stats["running"] + stats["parked"] + stats["delayed"])


def _outcome(way: str, server: Supervised, tally: Tally, fetched: int) -> Outcome:
    ends = tally.ends
    return Outcome(
        way=way,
        answered=ends["answered"],
        fetched_later=fetched,
        left_without=ends["left"] - fetched,
        too_late=ends["gave up"] + ends["expired"],
        failed=ends["failed"] + ends["turned away"],
        crashes=server.crashes,
        peak_mib=server.peak_bytes >> 20,
        median_wait_secs=round(statistics.median(tally.waited or [0]), 1),
        seconds=round(tally.seconds, 1),
    )


ROWS = {
    "answered": "answered",
    "fetched_later": "left, and found their answer later",
    "left_without": "left, and their answer was lost",
    "too_late": "too late for their deadline",
    "failed": "failed",
    "crashes": "times the server ran out of memory",
    "peak_mib": "most memory held, MiB",
    "median_wait_secs": "median wait for the first token, s",
    "seconds": "last answer after, s",
}


def table(outcomes: list[Outcome]) -> str:
    """The outcomes side by side, as Markdown that also reads as text."""
    lines = [["", *(outcome.way for outcome in outcomes)], ["---", *("---:" for _ in outcomes)]]
    lines += [[words, *(str(getattr(outcome, name)) for outcome in outcomes)] for name, words in ROWS.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=Path, default=HERE / "pools.json")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--within", type=float, default=3.0, help="seconds in which they come (default: %(default)s)")
    parser.add_argument("--speed", type=float, default=80, help="tokens a second of the stand-in")
    parser.add_argument("--load-secs", type=float, default=0.5, help="that its weights take to load")
    parser.add_argument("--workers", type=int, default=2, help="of pgpark (default: %(default)s)")
    parser.add_argument("--dsn", help="a Postgres (default: an embedded one, for this run)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    cost = LlmCostModel.from_config(json.loads(given.pools.read_text())["pools"]["llm"]["cost_model"])
    asks = plan(given.requests, given.within)
    sizes = [_mib(cost, ask) for ask in asks]
    room = float((cost.max_units or 0) * cost.unit_bytes) / (1 << 20)
    card, weights = float(cost.gpu_vram_total_gb or 0) * 1024, float(cost.weights_gb or 0) * 1024
    print(f"{len(asks)} requests in {given.within:g} s, each of {min(sizes):.0f} to {max(sizes):.0f} MiB, together")
    print(
        f"{sum(sizes):.0f} MiB; a card of {card:.0f} MiB, of which {weights:.0f} are weights; the pool has {room:.0f}\n"
    )
    outcomes = []
    for at_once in (None, max(1, int(room / max(sizes)))):
        with Supervised(given.pools, given.speed, given.load_secs) as server:
            outcomes.append(asyncio.run(directly(server, asks, at_once)))
            _progress(outcomes[-1])
    with (
        Supervised(given.pools, given.speed, given.load_secs) as server,
        served(given.pools, server.url, given.dsn, given.workers) as url,
    ):
        outcomes.append(asyncio.run(through_pgpark(server, asks, url)))
        _progress(outcomes[-1])
    print(table(outcomes))
    if given.json:
        figures: dict[str, Any] = {"card_mib": card, "outcomes": [asdict(outcome) for outcome in outcomes]}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def _progress(outcome: Outcome) -> None:
    print(f"{outcome.way}: done in {outcome.seconds} s", file=sys.stderr, flush=True)


def _mib(cost: LlmCostModel, ask: Ask) -> float:
    prompt_tokens = count_tokens(str(ask.body["messages"][0]["content"]))
    return float(cost.units(prompt_tokens, ask.max_tokens) * cost.unit_bytes) / (1 << 20)


if __name__ == "__main__":
    main()
