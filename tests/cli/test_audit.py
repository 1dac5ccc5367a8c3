"""`pgpark audit`: what happened to tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from tests.cli.test_commands import Pgpark, pgpark
from tests.conftest import Database

__all__ = ["pgpark"]  # a fixture


def busy(db: Database) -> int:
    db.pool(audit=True)
    db.pool("cpu", audit=True)
    db.parked("cpu", tenant="b")
    task = db.parked(tenant="a")
    db.claim()
    db.finish(task)
    return task


def test_it_shows_the_last_events_oldest_first(pgpark: Pgpark, db: Database) -> None:
    task = busy(db)
    assert [row["event"] for row in pgpark("audit", "--json", "--task", str(task)).rows] == [
        "submitted",
        "started",
        "completed",
    ]
    assert [row["event"] for row in pgpark("audit", "gpu", "--json", "--limit", "2").rows] == ["started", "completed"]
    assert [row["pool"] for row in pgpark("audit", "--json", "--tenant", "b", "--since", "-1h").rows] == ["cpu"]
    assert pgpark("audit", "--json", "--until", "-1h").out == ""
    assert pgpark("audit", "--event", "started").out.splitlines()[1].split()[2:5] == ["started", "gpu", str(task)]


def test_what_others_said_is_shown_and_never_obeyed_by_the_terminal(pgpark: Pgpark, db: Database) -> None:
    db.pool(audit=True)
    task = db.parked(tenant="a\x1b[2Jb")
    db.claim(worker="w\x9b31m")
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, %s)", task, "no\x1b]0;luck\x07\ntoday")
    for command in (["audit"], ["status", str(task)], ["mailbox", "fetch", "a\x1b[2Jb"]):
        printed = pgpark(*command)
        assert printed.code == 0
        assert all(letter.isprintable() for letter in printed.out.replace("\n", "")), command
        assert "no?]0;luck??today" in printed.out, command


def test_more_than_a_page_is_shown_whole(pgpark: Pgpark, db: Database) -> None:
    db.pool(audit=True)
    db.rows(
        "select from pgpark.park_submit_many('gpu', (select jsonb_agg('{\"payload\": 1}'::jsonb)"
        " from generate_series(1, 2500)))"
    )  # all at one time
    shown = [row["task_id"] for row in pgpark("audit", "gpu", "--json", "--limit", "2400").rows]
    assert shown == list(range(101, 2501))


def test_wrong_words_are_one_line(pgpark: Pgpark) -> None:
    assert pgpark("audit", "--follow", "--until", "-1h").err == (
        "pgpark audit: --follow has no end; leave out --until\n"
    )
    printed = pgpark("audit", "--event", "vanished")
    assert printed.code == 2
    assert printed.err.startswith("pgpark: unknown event 'vanished'; use submitted, rejected, ")
    assert pgpark("audit", "gpu").err == "no such event was written; pools write with `audit: true` in their config\n"


def test_follow_tells_each_event_once_also_one_that_is_committed_late(db: Database, dsn: str) -> None:
    task = busy(db)
    late = Database(dsn)
    late.connection.execute("begin")
    second = late.parked(tenant="late")
    command = [sys.executable, "-m", "pgpark", "audit", "gpu", "--follow", "--limit", "1", "--interval", "0.1"]
    with subprocess.Popen(
        command, env=os.environ | {"PGPARK_DSN": dsn}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        patience = threading.Timer(60, process.kill)  # what never comes would be waited for
        patience.start()
        try:
            lines = [process.stdout.readline()]  # the last of before
            third = db.parked()
            lines.append(process.stdout.readline())
            late.connection.execute("commit")
            lines.append(process.stdout.readline())
        finally:
            patience.cancel()
            process.terminate()
        rest = process.stdout.read()
    late.close()
    assert [line.split()[2:5] for line in lines] == [
        ["completed", "gpu", str(task)],
        ["submitted", "gpu", str(third)],
        ["submitted", "gpu", str(second)],
    ]
    assert rest == ""
    assert process.returncode == 143
