"""`pgpark result --follow`: what a task emits as it comes, and the outcome at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from psycopg.types.json import Jsonb

from tests.cli.test_commands import Pgpark, pgpark
from tests.conftest import Database

__all__ = ["pgpark"]  # a fixture


def emit(db: Database, task: int, *parts: Any, attempt: int = 1) -> None:
    """Emits strings as partial results, and whole parts."""
    listed = [{"content": part} if isinstance(part, str) else part for part in parts]
    assert db.value("select pgpark.park_emit(%s, %s, %s)", task, attempt, Jsonb(listed))


def running(db: Database) -> int:
    db.pool()
    task = db.parked()
    assert db.claimed() == [task]
    return task


def progress(content: Any) -> dict[str, Any]:
    return {"kind": "progress", "content": content}


def test_text_is_printed_as_it_is_and_the_result_on_a_line_of_its_own(pgpark: Pgpark, db: Database) -> None:
    task = running(db)
    emit(db, task, "Hel", "lo\n", "wör", "ld", progress({"value": 0.5, "message": "half"}))
    db.finish(task, result={"words": 2})
    printed = pgpark("result", str(task), "--follow")
    assert (printed.code, printed.out) == (0, 'Hello\nwörld\n{"words": 2}\n')
    assert printed.err == "progress: 50% half\ncompleted\n"


def test_a_part_that_is_no_string_is_a_line_of_json(pgpark: Pgpark, db: Database) -> None:
    task = running(db)
    emit(db, task, "a", {"content": {"x": [1]}}, {"content": None}, "b\n", "", progress([1]), progress("[/b] 3 of 4"))
    db.finish(task)
    printed = pgpark("result", str(task), "--follow")
    assert printed.out == 'a\n{"x": [1]}\nnull\nb\nnull\n'
    assert printed.err == "progress: [/b] 3 of 4\ncompleted\n"


def test_with_json_each_part_and_the_outcome_is_a_line(pgpark: Pgpark, db: Database) -> None:
    task = running(db)
    emit(db, task, "a", progress(1))
    db.finish(task, status="failed")
    printed = pgpark("result", str(task), "--follow", "--json")
    assert printed.code == 1
    assert [(row.get("kind"), row.get("content"), row.get("status")) for row in printed.rows] == [
        ("partial", "a", None),
        ("progress", 1, None),
        (None, None, "failed"),
    ]


def test_following_ends_after_its_timeout_and_where_there_is_no_task(pgpark: Pgpark, db: Database) -> None:
    task = running(db)
    emit(db, task, "a")
    printed = pgpark("result", str(task), "--follow", "--timeout", "0.1")
    assert (printed.code, printed.out, printed.err) == (1, "a\n", f"task {task} is running, no outcome yet\n")
    printed = pgpark("result", "999", "--follow")
    assert (printed.code, printed.out, printed.err) == (1, "", "no task 999 here\n")


def test_text_comes_at_once_and_a_new_attempt_begins_a_line(db: Database) -> None:
    task = running(db)
    emit(db, task, "half a li")
    command = [sys.executable, "-m", "pgpark", "result", str(task), "--follow"]
    environment = os.environ | {"PGPARK_DSN": db.dsn}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
        try:
            assert following.stdout is not None
            assert following.stdout.read(9) == b"half a li"
            db.value("select pgpark.park_release(%s, 1)", task)
            db.claim()
            emit(db, task, "whole", attempt=2)
            assert following.stdout.read(6) == b"\nwhole"
            db.finish(task, attempt=2, result="ok")
            rest, errors = following.communicate(timeout=60)
            assert (rest, errors) == (b'\n"ok"\n', b"attempt 2 begins anew\ncompleted\n")
            assert following.returncode == 0
        finally:
            following.kill()
