"""What pgpark does here: the question and each file become a task, a worker runs them, the mailbox keeps the vectors.

The unit of the pool is a GiB of memory: as many tasks run at once as fit into the memory that was granted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from handler import Embedded, units

from pgpark import Client, PgparkError, calls
from pgpark.database import connect
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate

HERE = Path(__file__).resolve().parent
POOL = TENANT = "embed"
_LOOK_SECS = 1.0


@dataclass
class Session:
    """One run: the session of its messages, and its tasks by id (the question first)."""

    name: str
    tasks: dict[int, str]


def embed(files: list[Path], question: str, gib: int) -> tuple[Embedded, list[Embedded]]:
    """The question and the files with their vectors, made with at most `gib` GiB of memory.

    Raises PgparkError, also when the worker ends before its work is done.
    """
    with _database() as dsn, Client(dsn) as park:
        # The messages of a run that is killed stay behind: after an hour they are purged.
        park.run(calls.put_pool(POOL, {"max_units": gib, "max_bypass": 4, "mailbox": {"ttl_secs": 3600}}))
        session = _submit(park, files, question, gib)
        try:
            with _worker(dsn, gib) as worker:
                _wait(park, session, worker)
            messages = park.run(calls.fetch(TENANT, session_id=session.name, max_messages=len(session.tasks)))
        finally:
            _clean_up(park, session)
    done = {m.task_id: Embedded.model_validate(m.payload) for m in messages if m.status == "completed"}
    asked = done.pop(next(iter(session.tasks)), None)
    if asked is None or not done:
        raise PgparkError(f"{'the question was not' if asked is None else 'no file was'} embedded")
    return asked, list(done.values())


def _submit(park: Client, files: list[Path], question: str, gib: int) -> Session:
    session = Session(secrets.token_hex(4), {})
    address = {"tenant": TENANT, "session_id": session.name}
    payload = {"name": "the question", "text": question}
    tasks: list[dict[str, Any]] = [{"payload": payload, "units": units(len(question)), "priority": "high"} | address]
    for file in files:
        payload = {"name": file.name, "path": str(file)}
        tasks.append({"payload": payload, "units": units(file.stat().st_size)} | address)
    answers = park.run(calls.submit_many(POOL, tasks))
    for task, submitted in zip(tasks, answers, strict=True):
        name = task["payload"]["name"]
        if submitted.task_id is not None:
            session.tasks[submitted.task_id] = name
        else:
            _say(f"{name} was refused: {submitted.reason} (it takes {task['units']} GiB, granted are {gib})")
    return session


@dataclass
class _Worker:
    """A worker process and what it logs."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def check(self) -> None:
        """Raises PgparkError if it has ended."""
        code = self.process.poll()
        if code is not None and code < 0:
            raise PgparkError(f"the worker was ended by signal {-code}")
        if code is not None:
            self.log.seek(0)
            lines = self.log.read().decode(errors="replace").splitlines()
            raise PgparkError(f"the worker ended: {lines[-1] if lines else f'exit {code}'}")


@contextlib.contextmanager
def _worker(dsn: str, gib: int) -> Iterator[_Worker]:
    """A worker process, stopped on leaving. Its tasks share the cores of the machine."""
    command = [sys.executable, "-m", "pgpark", "worker", POOL, "--handler", "handler:embed"]
    command += ["--units", str(gib), "--concurrency", str(gib), "--grace", "2"]
    environment = {"PGPARK_DSN": dsn, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gib))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=HERE, env=os.environ | environment, stdout=log, stderr=log)
        try:
            yield _Worker(process, log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(park: Client, session: Session, worker: _Worker) -> None:
    """Until each task has its outcome."""
    started, most_units = time.monotonic(), 0
    _say("passages    secs     GiB  file")
    for task_id, name in session.tasks.items():
        while (message := park.wait(task_id, _LOOK_SECS)) is None:
            (pool,) = park.run(calls.stats(POOL))
            most_units = max(most_units, pool.used_units)
            worker.check()
        if message.status == "completed":
            told = message.payload
            _say(f"{len(told['passages']):8} {told['seconds']:7.1f} {told['peak_gib']:7.2f}  {name}")
        else:
            _say(f"{message.status}: {name}: {message.reason}")
    _say(f"{len(session.tasks)} tasks in {time.monotonic() - started:.1f} s, at most {most_units} units in use")


def _clean_up(park: Client, session: Session) -> None:
    """Leaves nothing of this run behind, however it went."""
    with contextlib.suppress(PgparkError):
        for task_id in session.tasks:
            park.run(calls.cancel(task_id, "the run was stopped"))
        messages = park.run(calls.fetch(TENANT, session_id=session.name, max_messages=max(1, len(session.tasks))))
        park.run(calls.ack([message.message_id for message in messages]))


@contextlib.contextmanager
def _database() -> Iterator[str]:
    """The DSN of the database in PGPARK_DSN, or of an embedded one."""
    if dsn := os.environ.get("PGPARK_DSN"):
        yield dsn
        return
    with EmbeddedServer(Path(os.environ.get("PGPARK_HOME", HERE / ".pgpark"))).use() as dsn:
        with connect(dsn) as connection:
            migrate(connection)
        yield dsn


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
