"""--log-json: a JSON object a line, with the task that it is about."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from pgpark import logs
from tests.conftest import Database, wait_for

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that another test ran in this process has said what each of its lines says."""
    monkeypatch.setattr(logs, "_process", {})


class Hostile:
    def __str__(self) -> str:
        raise OSError("no text of mine")

    __repr__ = __str__


def line(record: logging.LogRecord) -> dict[str, Any]:
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    said: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return said


def record(message: str = "hello %s", *args: Any, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("mine", logging.WARNING, "x.py", 1, message, args or ("you",), None)
    vars(made).update(extra)
    return made


def test_a_line_has_time_level_logger_message_and_extras() -> None:
    made = record(step=2)
    made.created = 1_800_000_000.25
    assert line(made) == {
        "time": "2027-01-15T08:00:00.250Z",
        "level": "WARNING",
        "logger": "mine",
        "message": "hello you",
        "step": 2,
    }


@pytest.mark.parametrize(
    "odd", [object(), float("nan"), {1, 2}, {(1, 2): 3}, b"\xff", "\ud800", Hostile(), [Hostile()]]
)
def test_an_extra_that_is_no_json_does_no_harm(odd: Any) -> None:
    said = line(record("two\nlines for %s", odd=odd))
    assert said["level"] == "WARNING"
    assert isinstance(said["odd"], str)


def test_an_exception_is_a_text() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        made = record()
        made.exc_info = sys.exc_info()
    assert line(made)["exception"].endswith("ValueError: no")


def worker(db: Database, *options: str, stderr: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pgpark", "worker", "gpu", "--dsn", db.dsn, "--name", "w1", *options]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ.copy(), stderr=stderr, text=True)


def lines_of(db: Database, *options: str, tasks: int = 1) -> list[dict[str, Any]]:
    """What a worker logs that runs tests.handlers:logs_and_fails."""
    with worker(db, "--handler", "tests.handlers:logs_and_fails", "--log-json", *options) as process:
        try:
            wait_for(lambda: len(db.rows("select from pgpark.mailbox")) == tasks)
        finally:
            process.terminate()
            err = process.communicate(timeout=60)[1]
    assert process.returncode == 0, err
    return [json.loads(line) for line in err.splitlines()]


@pytest.mark.parametrize("options", [(), ("--processes", "2")])
def test_what_a_handler_logs_says_its_task_and_attempt(db: Database, options: tuple[str, ...]) -> None:
    db.pool(retry={"max_attempts": 2, "backoff_secs": 0})
    tasks = [db.parked(), db.parked()]
    said = lines_of(db, *options, tasks=2)
    assert all((row["pool"], row["worker"]) == ("gpu", "w1") for row in said)
    for row in said:
        moment = datetime.fromisoformat(row["time"].replace("Z", "+00:00"))
        assert abs((datetime.now(timezone.utc) - moment).total_seconds()) < 600
    attempts = {(task, attempt) for task in tasks for attempt in (1, 2)}
    mine = [row for row in said if row["logger"] == "mine"]
    assert {(row["task"], row["attempt"]) for row in mine} == attempts
    assert {(row["level"], row["message"], row["step"]) for row in mine} == {("WARNING", "at it", 2)}
    failed = [row for row in said if row["message"].endswith("ValueError: no more")]
    assert {(row["task"], row["attempt"]) for row in failed} == attempts
    assert [row for row in said if "task" not in row and row["message"].startswith("worker w1 waits")]


def test_the_traceback_of_a_handler_is_a_field(db: Database) -> None:
    db.pool()
    db.parked()
    (told,) = [row for row in lines_of(db, "-v") if "exception" in row]
    assert "logs_and_fails" in told["exception"]
    assert told["level"] == "DEBUG"


def test_without_it_lines_are_for_people(db: Database) -> None:
    db.pool()
    task = db.parked()
    with worker(db, "--handler", "tests.handlers:logs_and_fails") as process:
        try:
            wait_for(lambda: db.rows("select from pgpark.mailbox"))
        finally:
            process.terminate()
            err = process.communicate(timeout=60)[1]
    assert f"WARNING task {task}, attempt 1: ValueError: no more\n" in err
    assert "{" not in err


def test_a_reader_of_the_log_that_leaves_does_no_harm(db: Database) -> None:
    db.pool()
    reading, writing = os.pipe()
    with worker(db, "--handler", "tests.handlers:logs_and_fails", "--log-json", stderr=writing) as process:
        os.close(writing)
        os.close(reading)
        try:
            task = db.parked()
            wait_for(lambda: db.rows("select from pgpark.park_result(%s)", task))
            more = db.parked()
            wait_for(lambda: db.rows("select from pgpark.park_result(%s)", more))
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert db.outcome(more) == ("failed", "ValueError: no more")
    assert process.returncode == 0


def test_the_notifier_logs_so_too(db: Database) -> None:
    db.pool()
    command = [sys.executable, "-m", "pgpark", "notifier", "run", "--pool", "gpu", "--dsn", db.dsn, "--log-json"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        process.terminate()
        process.communicate(timeout=60)
    assert (first["level"], first["pool"]) == ("INFO", "gpu")
