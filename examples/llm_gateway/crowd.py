#!/usr/bin/env python3
"""Sends so many requests at once to an OpenAI-compatible server, or to the gateway in front of it, and counts what they
got: `python crowd.py http://127.0.0.1:8080`, then `python crowd.py http://127.0.0.1:8000`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any

import httpx

_SENTENCE = "The lot is full of cars. "


async def one(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """What became of a request, in a few words."""
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"{response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
            async for line in response.aiter_lines():
                if line.startswith("data: {") and "error" in (event := json.loads(line[6:])):
                    return f"an error in the stream: {event['error'].get('message')}"
                if line == "data: [DONE]":
                    return "answered"
            return "cut off"
    except httpx.HTTPError as error:
        return type(error).__name__


async def crowd(url: str, bodies: list[dict[str, Any]]) -> Counter[str]:
    """All at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        return Counter(await asyncio.gather(*(one(http, body) for body in bodies)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument(
        "--sentences", type=int, default=7, help="of seven tokens, in each prompt (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=30)
    parser.add_argument("--model", default="default")
    given = parser.parse_args()
    bodies = [
        {
            "model": given.model,
            "stream": True,
            "ignore_eos": True,  # vLLM and llama.cpp: write as many tokens as they may
            "max_tokens": given.max_tokens,
            "messages": [{"role": "user", "content": f"{number} {_SENTENCE * given.sentences}"}],
        }
        for number in range(given.requests)
    ]
    started = time.monotonic()
    for words, count in asyncio.run(crowd(given.url, bodies)).most_common():
        print(f"{count} x {words}")
    print(f"in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
