"""What a worker and the processes of its handlers say to each other over a socket, in frames: a letter for the kind,
four bytes for the length, JSON."""

from __future__ import annotations

import json
import struct
from typing import Any

HEADER = struct.Struct(">cI")

# To the process: a task to run; the handler should stop; why no more parts are taken.
TASK, STOP, NO_MORE = b"T", b"S", b"N"
# From it: the handler is loaded; why it cannot be; [kind, content]; what the handler returned; why it failed; it was
# cancelled, as it was asked to stop.
READY, BROKEN, PART, RESULT, FAILURE, CANCELLED = b"R", b"B", b"P", b"D", b"F", b"C"


def frame(kind: bytes, body: Any = None) -> bytes:
    """A frame of this kind; the body as JSON."""
    return framed(kind, json.dumps(body).encode())


def framed(kind: bytes, encoded: bytes) -> bytes:
    """The same for what is JSON already."""
    return HEADER.pack(kind, len(encoded)) + encoded
