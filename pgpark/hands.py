"""What a worker has in its hands: its tasks from their claim until their outcomes are written, and those outcomes as
JSON, made once. Knows nothing of Postgres."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import to_json, to_jsonable_python

from pgpark.errors import one_line
from pgpark.executors import HandlerError, TaskContext

_LARGEST_RESULT = 100_000_000  # bytes; a jsonb value ends at 256 MiB
_LARGEST_BATCH = 100_000_000  # bytes of outcomes that are written at once
_REASON_KEPT = 2000


class Run:
    """A task in the hands of this worker. outcome: an element of park_finish_many as JSON, once there is one."""

    __slots__ = ("asked_to_stop", "attempt", "completed", "context", "job", "outcome", "reason", "task_id", "writing")

    def __init__(self, task_id: int, attempt: int, context: TaskContext) -> None:
        self.task_id = task_id
        self.attempt = attempt
        self.context = context
        self.job: asyncio.Task[None] | None = None
        self.outcome: bytes | None = None
        self.reason: str | None = None  # why it failed
        self.completed = False
        self.asked_to_stop = False
        self.writing = False  # its outcome is on its way

    def complete(self, result: bytes) -> None:
        """The attempt has completed with this result, as JSON."""
        self.completed = True
        self.outcome = b'{"task_id":%d,"attempt":%d,"status":"completed","result":%b}' % (
            self.task_id,
            self.attempt,
            result,
        )

    def fail(self, reason: str | None) -> None:
        """The attempt has failed, for a reason that `shortened` has made. Without one the database gives its own:
        cancelled, or run_timeout."""
        self.completed = False
        self.reason = reason
        outcome = {"task_id": self.task_id, "attempt": self.attempt, "status": "failed"}
        self.outcome = json.dumps(outcome if reason is None else outcome | {"reason": reason}).encode()

    def final_outcome(self) -> bytes:
        """The outcome, once the parts are written; a failure when they could not be: a reader would miss something."""
        if self.completed and (refusal := self.context.parts.refusal) is not None:
            self.fail(shortened(refusal))
        assert self.outcome is not None
        return self.outcome


class Hands:
    """The runs of a worker. Those that may still have to run and those that it has asked for are at most `room`.

    All of it runs on the worker's event loop; only `attempts` is read by the heartbeat's thread too.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._asked_for = 0
        self._writing = 0
        self._runs: dict[int, Run] = {}
        self._ended: list[Run] = []  # with an outcome that nobody is writing yet, oldest first

    def __len__(self) -> int:
        return len(self._runs)

    def runs(self) -> list[Run]:
        """All of them."""
        return list(self._runs.values())

    def attempts(self) -> dict[int, int]:
        """The attempts by task id."""
        return {task_id: run.attempt for task_id, run in self._runs.copy().items()}

    def get(self, task_id: int) -> Run | None:
        """The run of this task."""
        return self._runs.get(task_id)

    def hold(self, run: Run) -> None:
        """Takes a run that was claimed; one of an earlier attempt, lost while we were cut off, is let go."""
        if (earlier := self._runs.get(run.task_id)) is not None:
            self._wrote(earlier)
        self._runs[run.task_id] = run

    def ended(self, run: Run) -> bool:
        """The run has an outcome that may be written; False if it is no longer ours."""
        if self._runs.get(run.task_id) is not run:
            return False
        self._ended.append(run)
        return True

    def without_outcome(self, attempts: Mapping[int, int]) -> list[Run]:
        """The runs of these attempts, by task id, that go on."""
        runs = [self._runs.get(task_id) for task_id in attempts]
        return [run for run in runs if run and run.attempt == attempts[run.task_id] and run.outcome is None]

    def any_at_work(self) -> bool:
        """Whether there is a run that goes on, or an outcome to write; else what there is can be released."""
        return any(run.outcome is not None or run.job is None or not run.job.done() for run in self._runs.values())

    @property
    def any_ended(self) -> bool:
        """Whether there are outcomes to write."""
        return bool(self._ended)

    def free(self) -> int:
        """How many tasks may be asked for. One whose outcome is being written has run."""
        return self._room - len(self._runs) + self._writing - self._asked_for

    def take_ended(self, at_most: int) -> list[Run]:
        """Outcomes to write now, the oldest first; those that were let go meanwhile are passed over."""
        taken: list[Run] = []
        size = looked = 0
        for run in self._ended[:at_most]:
            size += len(run.outcome or b"")
            if taken and size > _LARGEST_BATCH:
                break
            looked += 1
            if self._runs.get(run.task_id) is run:
                taken.append(run)
                run.writing = True
        del self._ended[:looked]
        self._writing += len(taken)
        return taken

    def give_back(self, taken: Iterable[Run]) -> None:
        """What of this was not written must be written later."""
        back = [run for run in taken if self._runs.get(run.task_id) is run]
        for run in back:
            self._wrote(run)
        self._ended[:0] = back

    def let_go(self, run: Run) -> None:
        """The outcome of this run is written, or it was fenced off or released."""
        if self._runs.get(run.task_id) is run:
            self._wrote(run)
            del self._runs[run.task_id]

    def _wrote(self, run: Run) -> None:
        self._writing -= run.writing
        run.writing = False

    def ask_for(self, slots: int) -> None:
        """So many tasks are being asked for; call with the negative number when the answer is there."""
        self._asked_for += slots


def result_json(value: Any) -> bytes:
    """A result as JSON; models, dataclasses, times and the like are converted. Raises HandlerError."""
    try:
        encoded = to_json(value, inf_nan_mode="constants")
        if b"NaN" in encoded or b"Infinity" in encoded:  # in a string, or as a number that JSON does not have
            json.dumps(to_jsonable_python(value), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise HandlerError(f"the result is not JSON: {one_line(error)}") from error
    if len(encoded) > _LARGEST_RESULT:
        raise HandlerError(
            f"the result is too large: {len(encoded)} bytes as JSON, at most {_LARGEST_RESULT} can be stored"
        )
    return encoded


def shortened(reason: str) -> str:
    """A reason as the database can store it; of a long one the beginning and the end are kept."""
    clean = reason.encode("utf-8", "replace").decode().replace("\0", "")
    if len(clean) > _REASON_KEPT:
        clean = f"{clean[: _REASON_KEPT // 2]} [...] {clean[-_REASON_KEPT // 2 :]}"
    return clean


def named(error: BaseException) -> str:
    """An exception as a reason: its class and its text."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
