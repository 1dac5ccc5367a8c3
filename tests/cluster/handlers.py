"""What the workers of these tests do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any


async def wait_for_gate(payload: dict[str, Any]) -> str:
    """Runs until its gate, a file, is there."""
    while not await asyncio.to_thread(Path(payload["gate"]).exists):
        await asyncio.sleep(0.02)
    return "through"
