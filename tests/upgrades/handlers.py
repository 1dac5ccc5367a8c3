"""Handlers for workers of any release; nothing is imported that only some of them have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any


async def wait_for_file(payload: dict[str, Any]) -> int:
    """Ends when the file of the payload is there, at once if it names none."""
    while "file" in payload and not Path(payload["file"]).exists():
        await asyncio.sleep(0.01)
    return int(payload["n"])
