"""`pgpark demo`: two worker processes share 24 units, one of them is killed, and every task still has its outcome."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg.rows import DictRow
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pgpark import calls
from pgpark.cli.common import Settings, dsn_options, messages, print_json, results_console
from pgpark.database import connect
from pgpark.errors import DatabaseError, UnknownPoolError
from pgpark.migrate import migrate

POOL = "pgpark_demo"
MAX_UNITS = 24
WORKER_UNITS = 16
TENANTS = ("acme", "globex", "initech")
PRIORITIES = ("critical", "high", "normal", "low")
_QUEUES = ("in_memory", "postgres_custom", "postgres_pgmq", "yaque")
_MAILBOXES = ("in_memory", "postgres")
_TASKS = 72
_GIVE_UP_SECS = 60.0
_LOOK_SECS = 0.1
_BECAME = {"completed": "completed by the other worker", "expired": "expired, too late to start again"}
_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")


async def pretend(payload: dict[str, Any]) -> dict[str, Any]:
    """The handler of the demo: a model that takes its time."""
    await asyncio.sleep(payload["secs"])
    return {"answer": f"{payload['prompt']}: done in {payload['secs']} s", "pid": os.getpid()}


@dataclass
class _Show:
    """What was seen while it ran."""

    started: float = field(default_factory=time.monotonic)
    samples: int = 0
    most_units: int = 0
    kill_note: str = ""
    inherited: list[int] = field(default_factory=list)


@click.command()
@click.option("--queue", default="postgres_pgmq", show_default=True, type=click.Choice(_QUEUES), help="Its queue.type.")
@click.option("--mailbox", default="postgres", show_default=True, type=click.Choice(_MAILBOXES), help="Its mailbox.")
@dsn_options
def demo(settings: Settings, queue: str, mailbox: str) -> int:
    """Watch 72 tasks of 1 to 16 units share a pool of 24, with one of two workers killed half-way."""
    if settings.dsn:
        messages.print("using your database ...")
    else:
        settings = dataclasses.replace(settings, home=settings.home / "demo")  # not among the user's own tasks
        messages.print("starting a database ...")
    with (
        settings.database() as dsn,
        tempfile.TemporaryDirectory() as logs,
        contextlib.closing(connect(dsn)) as connection,
    ):
        migrate(connection)
        _prepare(connection, {"queue": {"type": queue}, "mailbox": {"storage": {"type": mailbox}}})
        with _workers(dsn, Path(logs)) as workers:
            show = _watch(connection, workers, Path(logs))
        return _report(settings, connection, show)


def _prepare(connection: psycopg.Connection[DictRow], kept: dict[str, Any]) -> None:
    """Makes the pool anew, which keeps things as `kept` says, and submits the tasks."""
    with contextlib.suppress(UnknownPoolError):
        calls.run_on(connection, calls.drop_pool(POOL, force=True))
    connection.execute("select pgpark.park_ack(array(select message_id from pgpark.mailbox where pool = %s))", [POOL])
    config = {"max_units": MAX_UNITS, "resource_kind": "gpu_vram", "max_bypass": 8, "lease_secs": 2}
    calls.run_on(connection, calls.put_pool(POOL, config | kept))
    dice = random.Random(7)
    tasks = []
    for number in range(_TASKS):
        task: dict[str, Any] = {
            "payload": {"prompt": f"prompt {number}", "secs": round(dice.uniform(0.2, 1.0), 2)},
            "units": dice.choice((1, 1, 2, 2, 3, 4, 4, 6, 8, 8, 12, 16)),
            "priority": dice.choices(PRIORITIES, (1, 3, 5, 3))[0],
            "tenant": TENANTS[number % len(TENANTS)],
            "user_id": f"user{number % 4}",
        }
        if number % 7 == 0:  # in a hurry, and not important enough to get in before
            row = connection.execute(
                "select pgpark._now() + %s * interval '1 second' as at", [2 + number / 20]
            ).fetchone()
            assert row is not None
            task |= {"priority": "low", "deadline": row["at"].isoformat()}
        tasks.append(task)
    calls.run_on(connection, calls.submit_many(POOL, tasks))


@contextlib.contextmanager
def _workers(dsn: str, logs: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Two worker processes, ended on leaving."""
    processes = {}
    for name in ("worker-a", "worker-b"):
        command = [sys.executable, "-m", "pgpark", "worker", POOL, "--handler", f"{__name__}:pretend"]
        command += ["--units", str(WORKER_UNITS), "--concurrency", "16", "--name", name, "--grace", "2"]
        with (logs / name).open("wb") as log:
            processes[name] = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ | {"PGPARK_DSN": dsn})
    try:
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _watch(connection: psycopg.Connection[DictRow], workers: dict[str, subprocess.Popen[bytes]], logs: Path) -> _Show:
    """Draws the lot until it is empty, and kills a worker when half of the tasks have ended."""
    show = _Show()
    last_line = 0.0
    with Live(console=messages, auto_refresh=False, transient=True) as live:
        while True:
            (stats,) = calls.run_on(connection, calls.stats(POOL))
            running = connection.execute(
                "select task_id, units, worker, priority from pgpark.task join pgpark.pool using (pool_id)"
                " where name = %s and task.state in ('running', 'cancelling') order by task_id",
                [POOL],
            ).fetchall()
            show.samples += 1
            show.most_units = max(show.most_units, stats.used_units, sum(row["units"] for row in running))
            ended = stats.completed + stats.failed + stats.expired + stats.dropped
            held = [row for row in running if row["worker"] == "worker-a"]
            if not show.kill_note and ended >= _TASKS // 2 and len(held) > 1:
                show.inherited = _kill(connection, workers["worker-a"])
                show.kill_note = f"worker-a killed with kill -9 while it held {len(show.inherited)} tasks"
            if messages.is_terminal:
                live.update(_picture(connection, stats, running, show), refresh=True)
            elif time.monotonic() - last_line >= 1:
                last_line = time.monotonic()
                messages.print(_line(stats, show), soft_wrap=True)
            if stats.running + stats.parked + stats.delayed == 0:
                return show
            if workers["worker-b"].poll() is not None or time.monotonic() - show.started > _GIVE_UP_SECS:
                raise DatabaseError(f"the demo's worker gave up: {(logs / 'worker-b').read_text()[-500:]}")
            time.sleep(_LOOK_SECS)


def _kill(connection: psycopg.Connection[DictRow], worker: subprocess.Popen[bytes]) -> list[int]:
    """Kills a worker and returns the tasks that it held: stopped first, so that it cannot finish one meanwhile."""
    worker.send_signal(signal.SIGSTOP)
    time.sleep(_LOOK_SECS)  # for a statement that is under way
    held = connection.execute(
        "select task_id from pgpark.task join pgpark.pool using (pool_id) where name = %s and worker = 'worker-a'",
        [POOL],
    ).fetchall()
    worker.kill()
    return [row["task_id"] for row in held]


def _line(stats: Any, show: _Show) -> str:
    bar = "#" * stats.used_units + "." * (MAX_UNITS - stats.used_units)
    note = f"  ({show.kill_note})" if show.kill_note else ""
    return (
        f"[{bar}] {stats.used_units:2}/{MAX_UNITS} units, {stats.running} running, {stats.parked} parked, "
        f"{stats.completed} completed, {stats.expired} expired{note}"
    )


def _picture(connection: psycopg.Connection[DictRow], stats: Any, running: list[DictRow], show: _Show) -> Group:
    parked = {
        row["priority"]: row["count"]
        for row in connection.execute(
            "select pgpark._priority_word(priority) as priority, count(*) from pgpark.task"
            " join pgpark.pool using (pool_id) where name = %s and task.state = 'parked' group by priority",
            [POOL],
        )
    }
    bar = Text(" ")
    for row in running:
        color = _COLORS[row["task_id"] % len(_COLORS)]
        bar.append("█" * (row["units"] - 1) + "▌", style=color)
    bar.append("░" * (MAX_UNITS - sum(row["units"] for row in running)), style="dim")
    lanes = Table.grid(padding=(0, 1))
    for priority in PRIORITIES:
        lanes.add_row(
            f" {priority:8}", Text("▪" * parked.get(priority, 0), style="yellow"), str(parked.get(priority, 0))
        )
    held = {name: [row["units"] for row in running if row["worker"] == name] for name in ("worker-a", "worker-b")}
    rows = [f" {name}: {sum(units):2} of {WORKER_UNITS} units in {len(units)} tasks" for name, units in held.items()]
    return Group(
        Text(f" {stats.used_units} of {MAX_UNITS} units in use, {stats.running} tasks running", style="bold"),
        bar,
        *(Text(row) for row in rows),
        Text(f"\n {stats.parked} parked, by priority", style="bold"),
        lanes,
        Text(f"\n {stats.completed} completed, {stats.expired} expired, {stats.dropped} dropped", style="bold"),
        Text(f" {show.kill_note}" if show.kill_note else "", style="red"),
    )


def _report(settings: Settings, connection: psycopg.Connection[DictRow], show: _Show) -> int:
    outcomes = connection.execute(
        "select status, count(*) from pgpark.mailbox where pool = %s group by status order by status", [POOL]
    ).fetchall()
    waits = connection.execute(
        "select pgpark._priority_word(priority) as priority, count(*) as started,"
        " round((percentile_cont(0.5) within group (order by waited))::numeric, 2)::float8 as median_secs,"
        " round(max(waited)::numeric, 2)::float8 as longest_secs"
        " from (select *, extract(epoch from started_at - submitted_at)::float8 as waited from pgpark.mailbox) m"
        " where pool = %s and started_at is not null"
        " group by m.priority order by m.priority desc",
        [POOL],
    ).fetchall()
    inherited = {
        row["status"]: row["count"]
        for row in connection.execute(
            "select status, count(*) from pgpark.mailbox"
            " where task_id = any (%s) and worker is distinct from 'worker-a' group by status order by status",
            [show.inherited],
        )
    }
    messages_of = {tenant: calls.run_on(connection, calls.fetch(tenant, max_messages=1000)) for tenant in TENANTS}
    ended = sum(row["count"] for row in outcomes)
    if settings.json:
        print_json(
            {
                "submitted": _TASKS,
                "most_units": show.most_units,
                "max_units": MAX_UNITS,
                "samples": show.samples,
                "outcomes": {row["status"]: row["count"] for row in outcomes},
                "waits": waits,
                "held_when_killed": len(show.inherited),
                "inherited": inherited,
                "mailbox": {tenant: len(rows) for tenant, rows in messages_of.items()},
                "seconds": round(time.monotonic() - show.started, 1),
            }
        )
    else:
        out = results_console()
        out.print(f"{_TASKS} tasks in {time.monotonic() - show.started:.1f} s on two workers, one killed half-way\n")
        out.print(f"most units ever in use   {show.most_units} of {MAX_UNITS} ({show.samples} looks)")
        out.print("outcomes                 " + ", ".join(f"{row['count']} {row['status']}" for row in outcomes))
        became = ", ".join(f"{count} {_BECAME.get(status, status)}" for status, count in inherited.items())
        out.print(f"held by the killed one   {len(show.inherited)} tasks: {became}\n")
        out.print("waiting time in seconds")
        drawn = Table(box=None, pad_edge=False)
        for name in ("priority", "started", "median", "longest"):
            drawn.add_column(name, justify="left" if name == "priority" else "right")
        for row in waits:
            drawn.add_row(
                row["priority"], str(row["started"]), f"{row['median_secs']:.2f}", f"{row['longest_secs']:.2f}"
            )
        out.print(drawn)
        out.print("\nfrom the mailbox")
        for tenant, rows in messages_of.items():
            for message in [next(m for m in rows if m.status == status) for status in sorted({m.status for m in rows})]:
                told = message.payload or message.reason
                out.print(f"  {tenant:8} task {message.task_id}: {message.status} {told}")
            out.print(f"  {tenant:8} ... {len(rows)} messages in all")
        where = "" if settings.dsn else f" --home {settings.home}"
        messages.print(f"\nlook around: pgpark stats{where}; pgpark mailbox fetch acme{where}", soft_wrap=True)
    return 0 if ended == _TASKS and show.most_units <= MAX_UNITS else 1
