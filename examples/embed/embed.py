"""What pgpark does here: the question and each file become a task, a worker runs them, the mailbox keeps the vectors."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from handler import Embedded, units

from pgpark import Client, PgparkError, calls
from pgpark.database import connect
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate

HERE = Path(__file__).resolve().parent
POOL = TENANT = "embed"
_QUESTION = "the question"
_LOOK_SECS = 1.0


def embed(files: list[Path], question: str, gib: int) -> tuple[Embedded, list[Embedded]]:
    """The question and the files with their vectors. At most `gib` GiB of memory are used at once.

    Raises PgparkError, also when the worker ends before its work is done.
    """
    session = secrets.token_hex(4)  # of this run, so that it fetches nobody else's outcomes
    with _database() as dsn, Client(dsn) as park:
        # A run that was killed cannot acknowledge its messages: they are purged an hour later.
        park.run(calls.put_pool(POOL, {"max_units": gib, "max_bypass": 4, "mailbox": {"ttl_secs": 3600}}))
        tasks = _submit(park, files, question, gib, session)
        try:
            with _worker(dsn, gib) as (process, log):
                _wait(park, tasks, process, log)
            messages = park.run(calls.fetch(TENANT, session_id=session, max_messages=len(tasks)))
            done = [Embedded.model_validate(m.payload) for m in messages if m.status == "completed"]
        finally:
            _clean_up(park, tasks, session)
    texts = {file.name: file for file in done}
    if (asked := texts.pop(_QUESTION, None)) is None:
        raise PgparkError("the question was not embedded")
    return asked, list(texts.values())


def _submit(park: Client, files: list[Path], question: str, gib: int, session: str) -> dict[int, str]:
    """Submits everything at once; the names by task id."""
    address = {"tenant": TENANT, "session_id": session}
    tasks: list[dict[str, Any]] = [
        {"payload": {"name": _QUESTION, "text": question}, "units": units(len(question)), "priority": "high"} | address
    ]
    for file in files:
        payload = {"name": file.name, "path": str(file)}
        tasks.append({"payload": payload, "units": units(file.stat().st_size)} | address)
    accepted = {}
    for task, answer in zip(tasks, park.run(calls.submit_many(POOL, tasks)), strict=True):
        name = task["payload"]["name"]
        if answer.task_id is None:
            _say(f"{name}: {answer.reason}, it takes {task['units']} GiB of memory and there are {gib}")
        else:
            accepted[answer.task_id] = name
    return accepted


@contextlib.contextmanager
def _worker(dsn: str, gib: int) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A worker process with its log, stopped on leaving."""
    command = [sys.executable, "-m", "pgpark", "worker", POOL, "--handler", "handler:embed"]
    command += ["--units", str(gib), "--concurrency", str(gib), "--grace", "2"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=HERE, env=os.environ | {"PGPARK_DSN": dsn}, stdout=log, stderr=log)
        try:
            yield process, log
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(park: Client, tasks: dict[int, str], process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Until each task has its outcome."""
    started, most = time.monotonic(), 0
    for task_id, name in tasks.items():
        while (message := park.wait(task_id, _LOOK_SECS)) is None:
            most = max(most, park.run(calls.stats(POOL))[0].used_units)
            if process.poll() is not None:
                log.seek(0)
                last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                raise PgparkError(f"the worker ended (exit {process.returncode}): {''.join(last)}")
        if message.status == "completed":
            result = Embedded.model_validate(message.payload)
            _say(f"{name:24} {len(result.passages):4} passages {result.seconds:6.1f} s")
        else:
            _say(f"{name:24} {message.status}: {message.reason}")
    _say(f"{len(tasks)} tasks in {time.monotonic() - started:.1f} s; at most {most} units in use")


def _clean_up(park: Client, tasks: dict[int, str], session: str) -> None:
    """Leaves nothing of this run behind, however it went."""
    with contextlib.suppress(PgparkError):
        for task_id in tasks:
            park.run(calls.cancel(task_id, "the run was stopped"))
        messages = park.run(calls.fetch(TENANT, session_id=session, max_messages=len(tasks)))
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


def peak_gib() -> float:
    """The most memory that the worker ever had resident, in GiB; it is the largest of our child processes."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)  # bytes there, KiB elsewhere


def _say(line: str) -> None:
    print(line, file=sys.stderr)
