"""What a handler or a command emits while it runs, on its way to the worker: a bounded buffer, and a pipe for programs.
Knows nothing of Postgres; flusher.py writes what is in the buffers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from pgpark.errors import BadInputError, one_line
from pgpark.models import PartKind

log = logging.getLogger("pgpark.worker")

# The bounds of park_emit, so that a handler hears of them where it emits.
LARGEST_PART = 1 << 20
MOST_EMITTED = 64 << 20
_OVERHEAD = 100  # bytes that a part costs beside its JSON

_FULL_PARTS, _FULL_BYTES = 1000, 4 << 20  # of a buffer: from here on emitting waits
_BATCH_PARTS, _BATCH_BYTES = 500, 1 << 20  # of one call of park_emit

_LONGEST_LINE = LARGEST_PART + 1000
_CHUNK = 64 << 10
_COMPLAINTS = 5  # of one program, then only their number

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


@dataclass(frozen=True)
class Emitted:
    """A part that waits, and its size in bytes."""

    kind: PartKind
    content: Any
    size: int

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "content": self.content}


class PartBuffer:
    """Parts of one attempt, in the order in which they were put. Any thread may put, one at a time takes.

    announce: called, from the thread that puts, when there is something to take. Without it (a context made by hand, in
    a test of a handler) nobody takes, so putting never waits.
    """

    # One is made for each task, most of which emit nothing: it must be cheap.
    __slots__ = (
        "_announce", "_bytes", "_changed", "_closed", "_count", "_emitted_bytes", "_home", "_lock", "_progress_at",
        "_refusal", "_room", "_sending", "_waiting", "_written",
    )  # fmt: skip

    def __init__(self, announce: Callable[[], None] | None = None) -> None:
        self._announce = announce
        self._home = threading.get_ident()  # the event loop's thread, which must not wait
        self._lock = threading.Lock()
        self._changed: threading.Condition | None = None  # of that lock, once a thread waits for room
        self._room: asyncio.Event | None = None  # the same for a coroutine
        self._waiting: list[Emitted | None] = []  # None: progress that later progress has replaced
        self._progress_at: int | None = None  # where the progress in it is
        self._sending: list[Emitted] = []  # taken, and not known to be written; goes out again as it is
        self._written = 0
        self._count = 0  # of both lists, and their bytes
        self._bytes = 0
        self._emitted_bytes = 0  # of partial results, over the whole attempt
        self._closed = False
        self._refusal: str | None = None

    # -- for handlers ------------------------------------------------------------------------------------------------

    def put(self, kind: PartKind, content: Any) -> None:
        """Adds a part. Off the event loop's thread, waits while the buffer is full; progress never waits.

        Nothing happens once the attempt has ended or lost its task. Raises BadInputError for content that is no JSON,
        holds a NUL character, is larger than 1 MiB, or makes the partial results of the attempt exceed 64 MiB, and
        after the database has refused a part.
        """
        part = checked(kind, content)
        with self._lock:
            if kind == "partial" and self._announce is not None and threading.get_ident() != self._home:
                self._wait_for_room()
            if self._refusal is not None:
                raise BadInputError(self._refusal)
            if self._closed:
                return
            if kind == "partial":
                if self._emitted_bytes + part.size + _OVERHEAD > MOST_EMITTED:
                    raise BadInputError(f"this attempt has emitted {MOST_EMITTED} bytes, more are not kept")
                self._emitted_bytes += part.size + _OVERHEAD
            news = not self._waiting
            self._add(part)
        if news and self._announce is not None:
            self._announce()

    async def drain(self) -> None:
        """Waits while the buffer is full; for handlers on the event loop, which `put` never holds up."""
        while self._announce is not None and not self._closed and self._refusal is None and self._full():
            if self._room is None:
                self._room = asyncio.Event()
            self._room.clear()
            await self._room.wait()

    def _wait_for_room(self) -> None:
        if self._full() and self._changed is None:
            self._changed = threading.Condition(self._lock)
        if self._changed is not None:
            self._changed.wait_for(lambda: not self._full() or self._closed or self._refusal is not None)

    def _full(self) -> bool:
        return self._count >= _FULL_PARTS or self._bytes >= _FULL_BYTES

    def _add(self, part: Emitted) -> None:
        if part.kind == "progress":
            if self._progress_at is not None:
                replaced = self._waiting[self._progress_at]
                assert replaced is not None
                self._waiting[self._progress_at] = None
                self._count -= 1
                self._bytes -= replaced.size
                if self._progress_at == len(self._waiting) - 1:
                    self._waiting.pop()
            self._progress_at = len(self._waiting)
        self._waiting.append(part)
        self._count += 1
        self._bytes += part.size

    # -- for the worker, on the event loop ---------------------------------------------------------------------------

    @property
    def refusal(self) -> str | None:
        """Why the database refused a part, if it did."""
        return self._refusal

    @property
    def holds(self) -> bool:
        """Whether there is something to write."""
        return bool(self._waiting or self._sending)

    def batch(self) -> tuple[int, list[dict[str, Any]]]:
        """The next parts as park_emit takes them, and its argument `first`. The same again until `wrote`."""
        with self._lock:
            if not self._sending and self._waiting:
                self._take()
            return self._written + 1, [part.as_json() for part in self._sending]

    def _take(self) -> None:
        size = taken = 0
        for part in self._waiting:
            if part is not None:
                if self._sending and (len(self._sending) >= _BATCH_PARTS or size + part.size > _BATCH_BYTES):
                    break
                self._sending.append(part)
                size += part.size
            taken += 1
        del self._waiting[:taken]
        if self._progress_at is not None:
            self._progress_at = self._progress_at - taken if self._progress_at >= taken else None

    def wrote(self) -> None:
        """The batch is in the database."""
        with self._lock:
            self._written += len(self._sending)
            self._count -= len(self._sending)
            self._bytes -= sum(part.size for part in self._sending)
            self._sending = []
            self._let_go()

    def seal(self) -> None:
        """The attempt has ended: takes nothing more. What is in it is still written."""
        with self._lock:
            self._closed = True
            self._let_go()

    def discard(self) -> None:
        """The attempt has lost its task: takes nothing more, and nothing is written."""
        self._drop(None)

    def refuse(self, why: str) -> None:
        """The database does not take what is in it: whoever emits next is told."""
        self._drop(why)

    def _drop(self, refusal: str | None) -> None:
        with self._lock:
            self._closed = True
            self._refusal = refusal or self._refusal
            self._waiting, self._sending, self._progress_at = [], [], None
            self._count = self._bytes = 0
            self._let_go()

    def _let_go(self) -> None:
        if self._room is not None:
            self._room.set()
        if self._changed is not None:
            self._changed.notify_all()


def checked(kind: PartKind, content: Any) -> Emitted:
    """A part as it will be written. Raises BadInputError for content that cannot be."""
    try:
        plain = to_jsonable_python(content)
        encoded = json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInputError(f"a part must be JSON: {one_line(error)}") from error
    if _NUL.search(encoded):
        raise BadInputError("a part must not hold a NUL character: Postgres cannot store it")
    if len(encoded) > LARGEST_PART:
        raise BadInputError(f"a part is too large: {len(encoded)} bytes as JSON, at most {LARGEST_PART}")
    return Emitted(kind, plain, len(encoded))


class PartPipe:
    """A pipe on which a program emits: a JSON object {"kind": "partial" or "progress", "content": ...} per line.

    Lines that are something else are logged and passed over. While the buffer is full nothing is read, so that a
    program that writes too fast waits.
    """

    def __init__(self, buffer: PartBuffer, task_id: int) -> None:
        self._buffer = buffer
        self._task_id = task_id
        self._bad_lines = 0
        self._heard = 0  # how often there was something to read
        self._held_up = False  # by a full buffer
        self._reading, self.descriptor = os.pipe()  # descriptor: the end of the program

    def start(self) -> None:
        """Begins to read; call when the program has its end, which is closed here."""
        os.close(self.descriptor)
        self.descriptor = -1
        self._job = asyncio.create_task(self._read())

    async def finish(self, patience: float) -> None:
        """Reads on until the end; gives up after so many seconds without anything to read, since a process that was
        left behind may hold the other end."""
        try:
            while not self._job.done():
                heard = self._heard
                await asyncio.wait({self._job}, timeout=patience)
                if self._heard == heard and not self._held_up:
                    break
        finally:
            self._job.cancel()
            await asyncio.wait({self._job})
            self.close()
        if self._bad_lines > _COMPLAINTS:
            log.warning("task %d: %d lines on PGPARK_PARTS_FD were passed over", self._task_id, self._bad_lines)

    def close(self) -> None:
        """Closes what is still open."""
        for descriptor in (self._reading, self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._reading = self.descriptor = -1

    async def _read(self) -> None:
        reader = asyncio.StreamReader(limit=_CHUNK)
        loop = asyncio.get_running_loop()
        end = os.fdopen(self._reading, "rb", buffering=0)
        self._reading = -1
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), end)
        with contextlib.closing(transport):
            line, skipping = bytearray(), False
            while chunk := await reader.read(_CHUNK):
                self._heard += 1
                first, *others = chunk.split(b"\n")
                for piece, begins in ((first, False), *((other, True) for other in others)):
                    if begins:
                        if not skipping:
                            await self._emit(bytes(line))
                        line, skipping = bytearray(), False
                    line += piece
                    if len(line) > _LONGEST_LINE and not skipping:
                        self._complain(f"longer than {_LONGEST_LINE} bytes")
                        skipping = True
                    if skipping:
                        line.clear()
            if line and not skipping:
                await self._emit(bytes(line))

    async def _emit(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            part = json.loads(line)
            if not isinstance(part, dict) or "content" not in part or not part.keys() <= {"kind", "content"}:
                raise BadInputError('it must be an object {"kind": ..., "content": ...}')
            kind = part.get("kind", "partial")
            if kind not in ("partial", "progress"):
                raise BadInputError(f"unknown kind {str(kind)[:100]!r}; use partial or progress")
            self._buffer.put(kind, part["content"])
        except (ValueError, RecursionError) as error:
            self._complain(one_line(error))
        self._held_up = True
        await self._buffer.drain()
        self._held_up = False

    def _complain(self, why: str) -> None:
        self._bad_lines += 1
        if self._bad_lines <= _COMPLAINTS:
            log.warning("task %d: a line on PGPARK_PARTS_FD was passed over: %s", self._task_id, why)
