"""Runs a soak in a database of its own, gathers the evidence, and has it checked."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from tests.soak import answers, audit
from tests.soak.audit import Observer
from tests.soak.changes import Changes
from tests.soak.clients import Shared, run_process
from tests.soak.findings import Findings
from tests.soak.plan import LONGEST_WAIT_SECS, Plan
from tests.soak.replay import replay


@dataclass
class Report:
    """Figures by name, seconds by phase, and violations."""

    figures: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - before

    def __str__(self) -> str:
        lines = [f"{name:32}{figure:12,}" for name, figure in self.figures.items()]
        lines += ["", *(f"{'seconds ' + name:32}{secs:12,.1f}" for name, secs in self.seconds.items()), ""]
        return "\n".join([*lines, str(self.findings) or "no violations"])


def soak(dsn: str, plan: Plan, folder: Path, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Runs it in a migrated, empty database; folder: an empty one, for what the clients are told.

    Raises TimeoutError when tasks are not accepted any more, RuntimeError when a process of it dies.
    """
    report = Report()
    with psycopg.connect(dsn, autocommit=True) as connection, psycopg.connect(dsn, autocommit=True) as second:
        audit.install(connection)
        for name, config in plan.pools().items():
            connection.execute("select pgpark.park_put_pool(%s, %s)", [name, Jsonb(config)])
        with report.phase("at work"):
            observer, changes = _work(dsn, plan, folder, connection, second, progress)
        report.figures |= {"changes of pools": changes, "looks of the observer": len(observer.looks)}
        with report.phase("checking"):
            _check(connection, plan, folder, observer, report)
    return report


def _work(
    dsn: str,
    plan: Plan,
    folder: Path,
    connection: psycopg.Connection[Any],
    second: psycopg.Connection[Any],
    progress: Callable[[str], None],
) -> tuple[Observer, int]:
    spawn = multiprocessing.get_context("spawn")
    shared = Shared(
        accepted=spawn.Array("q", plan.connections),
        waiting=spawn.Array("q", len(plan.pools())),
        enough=spawn.Event(),
        clearing=spawn.Array("q", plan.connections),
        over=spawn.Event(),
    )
    processes = [
        spawn.Process(
            target=run_process,
            args=(dsn, plan, range(first, plan.connections, plan.processes), shared, folder),
            daemon=True,
        )
        for first in range(plan.processes)
    ]
    observer, changes = Observer(second, shared.waiting), Changes(dsn, plan)
    observer.start()
    try:
        for process in processes:
            process.start()
        changes.start()
        _wait("admitted", lambda: sum(shared.accepted[:]), plan.admissions, processes, progress)
        changes.stop()
        shared.enough.set()
        _wait("clearing up", lambda: sum(shared.clearing[:]), plan.connections, processes, progress)
        accepted = sum(shared.accepted[:])
        with contextlib.suppress(TimeoutError):  # what is left then is a violation
            _wait("ended", lambda: accepted - _live(connection), accepted, processes, progress)
    finally:
        changes.halt.set()
        observer.halt.set()
        shared.over.set()
        for process in processes:
            process.join(10)
            process.kill()
    observer.stop()
    return observer, changes.made


def _live(connection: psycopg.Connection[Any]) -> int:
    (count,) = connection.execute("select count(*) from pgpark.task").fetchone() or (0,)
    return int(count)


def _wait(
    what: str, count: Callable[[], int], goal: int, processes: Sequence[BaseProcess], progress: Callable[[str], None]
) -> None:
    """Until the count reaches the goal; while it changes, for as long as it takes."""
    before, since, told = count(), time.monotonic(), time.monotonic()
    while (now := count()) < goal:
        if now != before:
            before, since = now, time.monotonic()
        if not all(process.is_alive() for process in processes):
            raise RuntimeError(f"a process died; {what}: {now:,} of {goal:,}")
        if time.monotonic() > since + LONGEST_WAIT_SECS:
            raise TimeoutError(f"nothing happens any more; {what}: {now:,} of {goal:,}")
        if time.monotonic() > told + 10:
            told = time.monotonic()
            progress(f"{what}: {now:,} of {goal:,}")
        time.sleep(0.02)


def _check(connection: psycopg.Connection[Any], plan: Plan, folder: Path, observer: Observer, report: Report) -> None:
    findings, figures = report.findings, report.figures
    told = answers.read(folder)
    looks, posted = audit.read(connection)
    mailbox = connection.execute("select task_id, status, reason, payload from pgpark.mailbox").fetchall()
    answers.check(told, looks, posted, mailbox, findings)
    figures |= {"transactions audited": len({look.xid for look in looks}), "statements audited": len(looks)}
    looks += [*observer.looks, *told.snapshots()]
    starts, held = replay(looks, plan.workers(), told.before, findings)
    for kind, units in held.items():
        findings.add("units held at the end", f"{kind}: {units}")
    for task, state in connection.execute("select task_id, state from pgpark.task").fetchall():
        findings.add("tasks left in the ledger", f"{task} {state}")
    kinds = Counter(outcome.status for outcome in posted)
    _check_queues_and_stats(connection, kinds, findings)
    figures |= {"admissions": len(told.accepted), "duplicates": len(told.duplicates), "undone": len(told.undone)}
    figures |= {f"refused: {reason}": count for reason, count in sorted(told.refused.items())}
    figures |= {"starts": starts, "finishes accepted": len(told.finishes), "finishes fenced off": told.fenced}
    figures |= {"released": told.releases, "cancels": len(told.cancels), "taken out": len(told.taken)}
    figures |= {f"outcome: {status}": count for status, count in sorted(kinds.items())}
    reasons = Counter(outcome.reason for outcome in posted if outcome.status == "dropped")
    for reason in ("lost worker", "too_large", "overflow"):
        figures[f"dropped: {reason}"] = reasons[reason]


def _check_queues_and_stats(connection: psycopg.Connection[Any], kinds: Counter[str], findings: Findings) -> None:
    """No message is left behind, and what was counted is what landed."""
    for name, messages in connection.execute("select name, pgpark._messages(p) from pgpark.pool p").fetchall():
        live = "archived_at is null" if messages.startswith("pgpark.") else "true"
        (left,) = connection.execute(f"select count(*) from {messages} where {live}").fetchone() or (0,)
        if left:
            findings.add("messages left in a queue", f"{name}: {left}")
    columns = ["completed", "failed", "expired", "dropped"]
    sums = ", ".join(f"sum({column})" for column in columns)
    counted = connection.execute(f"select {sums} from pgpark.tally").fetchone() or ()
    for status, count in zip(columns, counted, strict=True):
        if int(count or 0) != kinds[status]:
            findings.add("tally and outcomes differ", f"{status}: {count}, outcomes {kinds[status]}")
