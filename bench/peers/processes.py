"""The processes of a compared system, and how they are talked to.

A system is used by processes of its own (bench/peers/programs): a submitter, and one or more workers. They run in the
environment that the system needs (our Python, the Python in bench/peers/.venv, Node), get the database by the PG*
variables of libpq, and talk by lines:

submitter   says `ready` when it is connected; for each line `one N` or `bulk N` it submits N tasks and answers
            `done BEGAN ENDED`
worker      says `ready` when its imports are done and it is connected, and begins to work at the line `go`; then says
            `c N` at every `step`th call of its handler (handler "count"), or `s NANOSECONDS` at each start of its
            handler (handler "stamp"). It ends at SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psycopg

PROGRAMS = Path(__file__).parent / "programs"
_START_SECS, _STOP_SECS, _STUCK_SECS = 60.0, 40.0, 120.0

now = time.monotonic_ns


class PeerError(RuntimeError):
    """A system did not do what it was asked to do; one line, with the last line of what its process said."""


class Submission(NamedTuple):
    """When a submit was called and when it had been committed and answered, in nanoseconds of `now`."""

    began: int
    ended: int

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / 1e9


class Process:
    """A program of bench/peers/programs, or another that speaks like one."""

    def __init__(
        self,
        command: Sequence[str],
        dsn: str,
        heard: Callable[[str], None],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path = PROGRAMS,
    ) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`stop` closes it)
        self._heard = heard
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=cwd,
            env=os.environ | variables(dsn) | dict(environment or {}),
        )
        self._what = Path(command[1] if len(command) > 1 else command[0]).name
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.error("ended too early") from None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that is not enough."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._thread.join(_STOP_SECS)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def error(self, what: str) -> PeerError:
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return PeerError(f"{self._what}: {what}; it said last: {said[-1] if said else 'nothing'}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard(line.rstrip("\n"))
        self._process.wait()
        self._heard("")  # it has ended


class Submitter:
    """A submitting process."""

    def __init__(self, command: Sequence[str], dsn: str) -> None:
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = Process(command, dsn, self._answers.put)
        try:
            self._answer("ready", _START_SECS)
        except PeerError:
            self.close()
            raise

    def submit(self, count: int) -> Submission:
        """Submits `count` tasks in bulk."""
        return self._submit("bulk", count)

    def submit_one_by_one(self, count: int) -> Submission:
        """Submits `count` tasks, a transaction each, one after another."""
        return self._submit("one", count)

    def close(self) -> None:
        self._process.stop()

    def _submit(self, how: str, count: int) -> Submission:
        self._process.say(f"{how} {count}")
        began, ended = self._answer("done", _STUCK_SECS * 10)
        return Submission(int(began), int(ended))

    def _answer(self, expected: str, seconds: float) -> list[str]:
        try:
            said = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise self._process.error(f"no {expected!r} within {seconds:g} s") from None
        word, *rest = said.split() or [""]
        if word != expected:
            raise self._process.error(f"said {said!r} instead of {expected!r}" if said else "ended too early")
        return rest


class Crew:
    """The worker processes of one system. They wait until `go`."""

    def __init__(self, step: int = 100) -> None:
        self.stamps: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._step = step
        self._processes: list[Process] = []
        self._called: dict[int, int] = {}
        self._ready: set[int] = set()
        self._changed = threading.Condition()
        self._start: Callable[[], None] = self._say_go

    def add(
        self, command: Sequence[str], dsn: str, *, environment: Mapping[str, str] | None = None, cwd: Path = PROGRAMS
    ) -> None:
        place = len(self._processes)
        self._called[place] = 0
        process = Process(command, dsn, lambda line: self._hear(place, line), environment=environment, cwd=cwd)
        self._processes.append(process)

    def go(self) -> int:
        """Lets them begin; the moment, in nanoseconds of `now`."""
        began = now()
        self._start()
        return began

    @property
    def called(self) -> int:
        """Calls of the handler so far, in whole steps of each process."""
        return sum(self._called.values())

    @property
    def slack(self) -> int:
        """How many calls may have been made beyond `called`."""
        return len(self._processes) * (self._step - 1)

    def next_stamp(self, seconds: float = 30.0) -> int:
        """The start of the next handler, in nanoseconds of `now`."""
        try:
            return self.stamps.get(timeout=seconds)
        except queue.Empty:
            raise self._processes[0].error(f"no handler was called within {seconds:g} s") from None

    def wait_called(self, count: int) -> None:
        """Until handlers were called `count` times, less what `slack` may hide where there are several processes."""
        goal = count // self._step * self._step if len(self._processes) == 1 else count - self.slack
        with self._changed:
            while (called := self.called) < goal:
                if not self._changed.wait(_STUCK_SECS) or self._dead():
                    if self.called > called:
                        continue
                    what = "ended" if self._dead() else "stuck"
                    raise self._processes[0].error(f"{what} after {called} of {count} tasks")

    def require_running(self) -> None:
        """Raises PeerError if a worker has ended."""
        for process in self._processes:
            if not process.running:
                raise process.error("ended too early")

    def wait_ready(self, enough: Callable[[], bool] | None = None) -> None:
        """Until all are connected: they said so, or `enough` says it for those that do not speak."""
        until = time.monotonic() + _START_SECS
        while not (enough() if enough else len(self._ready) == len(self._processes)):
            for process in self._processes:
                if not process.running or time.monotonic() > until:
                    raise process.error("did not start")
            time.sleep(0.02)

    def begin_by(self, start: Callable[[], None]) -> None:
        """What `go` is to do instead of saying `go`."""
        self._start = start

    def stop(self) -> None:
        for process in self._processes:
            process.stop()

    def _say_go(self) -> None:
        for process in self._processes:
            process.say("go")

    def _dead(self) -> bool:
        return any(not process.running for process in self._processes)

    def _hear(self, place: int, line: str) -> None:
        if line.startswith("s "):
            self.stamps.put(int(line[2:]))
            return
        with self._changed:
            if line.startswith("c "):
                self._called[place] = int(line[2:])
            elif line == "ready":
                self._ready.add(place)
            self._changed.notify_all()


def run_to_end(command: Sequence[str], dsn: str) -> None:
    """Runs a program that ends by itself. Raises PeerError when it fails."""
    done = subprocess.run(command, env=os.environ | variables(dsn), capture_output=True, text=True, timeout=_STUCK_SECS)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise PeerError(f"{Path(command[1]).name} {command[2]} failed: {said[-1] if said else done.returncode}")


def variables(dsn: str) -> dict[str, str]:
    """The PG* variables of a DSN, and BENCH_DSN itself."""
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}
    given = psycopg.conninfo.conninfo_to_dict(dsn)
    return {"BENCH_DSN": dsn} | {names[key]: str(value) for key, value in given.items() if key in names}
