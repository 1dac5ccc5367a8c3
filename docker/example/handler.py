"""The work of the example: takes its time, then answers and says which process did it.

As a program (`--exec "python handler.py"`) the payload comes as JSON on standard input and the result goes to standard
output; as a function (`--handler handler:handle`) the worker calls it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any


def handle(payload: dict[str, Any]) -> dict[str, Any]:
    """Counts the words of `text`, which takes `secs` seconds."""
    time.sleep(payload.get("secs", 0))
    return {"words": len(payload["text"].split()), "host": socket.gethostname(), "pid": os.getpid()}


if __name__ == "__main__":
    json.dump(handle(json.load(sys.stdin)), sys.stdout)
