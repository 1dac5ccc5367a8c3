"""The handlers that `pgpark worker` runs for the benches. BENCH_STEP: how often `count` says how far it is."""

from __future__ import annotations

import os
from typing import Any

import talk

_count = talk.counter(int(os.environ.get("BENCH_STEP", "100")))
RESULT = {"ok": True}


async def count(_payload: Any) -> dict[str, bool]:
    _count()
    return RESULT


async def stamp(_payload: Any) -> dict[str, bool]:
    talk.stamp()
    return RESULT
