"""How many tasks a second: pgpark, raw pgmq and six other queues on one server, each in its fastest way.

Run: python bench/peers/install.py, then python bench/throughput.py [--systems pgpark,pgmq] [--rounds 3] [--tasks 40000]
    [--quick] [--out FOLDER] [--dsn DSN]; without a DSN on an embedded server of its own.

Every task does nothing and carries 200 bytes. bench/peers has a module for each system, with its settings and where it
is said that they are the fastest. Each system and round gets a database of its own, and systems take turns within a
round. fsync and synchronous_commit must be on, for everyone. Writes FOLDER/throughput.md, throughput.json and, with
matplotlib, throughput.png. Measured, from processes of the system's own:

one by one     tasks submitted in a transaction each, on one connection
in bulk        tasks submitted in batches of 1,000, a transaction each
drain          tasks done by the worker, from the moment when it is connected and may begin, until the database shows
               that none is left. The database is looked at only once the last handlers have been called. Before: vacuum
               (analyze), so that no autovacuum falls into it, and a checkpoint, as before every measurement
end to end     submitted in bulk and then drained, one after the other: tasks by the sum of both times
WAL            bytes per task over submit in bulk and drain, full pages after the checkpoints included
commits        transactions per task, likewise (pg_stat_database.xact_commit). A session that listens counts one more
               for each wake-up
writing        those of them that write: transaction ids used, those of subtransactions too
dead           row versions per task that were made and are dead, likewise: made (n_tup_ins + n_tup_upd of all tables,
               by aborted transactions too) less those alive at the end, counted; so it is exact, vacuum or not

Ratios are taken within each round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg
import report
from meter import Meter
from peers import SYSTEMS, peers
from peers.base import Peer, PeerError
from server import chosen_server, new_database

from pgpark.database import connect

TASKS, ONE_BY_ONE = 40_000, 2000
QUICK_TASKS, QUICK_ONE_BY_ONE = 200, 20


@dataclass(frozen=True)
class Submits:
    """Tasks per second submitted one by one to one system in one round."""

    round: int
    system: str
    one_by_one: float


@dataclass(frozen=True)
class Drain:
    """One form of one system in one round: seconds, and what it cost per task."""

    round: int
    system: str
    name: str
    single: bool
    workers: int
    tasks: int
    submit_secs: float
    drain_secs: float
    wal: float
    commits: float
    writing: float
    dead: float

    @property
    def in_bulk(self) -> float:
        return self.tasks / self.submit_secs

    @property
    def drained(self) -> float:
        return self.tasks / self.drain_secs

    @property
    def end_to_end(self) -> float:
        return self.tasks / (self.submit_secs + self.drain_secs)


def submit_one_by_one(admin: str, peer: Peer, nth: int, count: int) -> Submits:
    with new_database(admin) as dsn:
        peer.install(dsn)
        with connect(admin) as connection:
            connection.execute("checkpoint")
        return Submits(nth, peer.system, count / peer.submit_one_by_one(dsn, count))


def submit_and_drain(admin: str, peer: Peer, nth: int, count: int) -> Drain:
    with new_database(admin) as dsn:
        peer.install(dsn)
        meter = Meter(admin, dsn)
        try:
            dead_before = meter.dead()
            meter.start()
            submit_secs = peer.submit_in_bulk(dsn, count)
            meter.stop()
            meter.stopped()
            with connect(dsn) as connection:
                connection.execute("vacuum (analyze)")
            meter.start()
            drain_secs, looks = drain(peer, dsn, count, meter.stop)
            meter.stopped(ours=looks)
            totals = (meter.wal, meter.commits, meter.writing, meter.dead() - dead_before)
        finally:
            meter.close()
    costs = (total / count for total in totals)
    return Drain(nth, peer.system, peer.name, peer.single, peer.workers, count, submit_secs, drain_secs, *costs)


def drain(peer: Peer, dsn: str, count: int, ended: Callable[[], None]) -> tuple[float, int]:
    """Seconds that the workers took, and how often the database was looked at. ended: called at the end, before the
    workers are."""
    step = next(step for step in range(100 if peer.workers == 1 else 10, 0, -1) if count % step == 0)
    with connect(dsn) as connection, peer.worker(dsn, "count", step) as crew:
        left, looks = peer.backlog(connection), 1
        if left != count:
            raise PeerError(f"{peer.name}: {left} tasks are waiting, not {count}")
        began = crew.go()
        crew.wait_called(count)
        until = time.monotonic() + 60
        while left := peer.backlog(connection):
            looks += 1
            if time.monotonic() > until:
                raise PeerError(f"{peer.name}: {left} tasks have not ended a minute after the last handler was called")
            time.sleep(0.001)
        took = (time.monotonic_ns() - began) / 1e9
        ended()
    return took, looks + 1


# -- the report ------------------------------------------------------------------------------------------------------


def submit_table(submits: Sequence[Submits], drains: Sequence[Drain]) -> str:
    rows = [["submitted per second", "one by one", "in bulk"]]
    for system in dict.fromkeys([each.system for each in submits] + [each.system for each in drains]):
        one = [each.one_by_one for each in submits if each.system == system]
        bulk = [each.in_bulk for each in drains if each.system == system]
        rows.append([system, report.spread(one), report.spread(bulk)])
    return report.table(rows)


def drain_table(drains: Sequence[Drain]) -> str:
    rows = [["done per second", "tasks", "drain", "end to end", "WAL bytes", "commits", "writing", "dead"]]
    for name, runs in by_name(drains).items():
        rows.append(
            [
                name,
                f"{runs[0].tasks:,}",
                report.spread([run.drained for run in runs]),
                report.spread([run.end_to_end for run in runs]),
                report.spread([run.wal for run in runs]),
                report.spread([run.commits for run in runs], ",.2f"),
                report.spread([run.writing for run in runs], ",.2f"),
                report.spread([run.dead for run in runs], ",.2f"),
            ]
        )
    return report.table(rows)


def ratio_table(submits: Sequence[Submits], drains: Sequence[Drain]) -> str:
    """pgpark against the others, each round by itself; rows for which a side is missing are left out."""
    rows = [["ratio", "reached", "to reach"]]

    def add(what: str, ours: dict[int, float], theirs: dict[int, float], goal: str) -> None:
        if ratios := [ours[nth] / theirs[nth] for nth in sorted(ours.keys() & theirs.keys())]:
            rows.append([what, report.spread(ratios, ".2f"), goal])

    others = [run for run in drains if run.system not in ("pgpark", "pgmq")]
    for form in ("worker", "SQL loop"):
        for batch, single, goals in ((100, False, ("1.2", "0.6")), (1, True, ("1.3", ""))):
            name = f"pgpark {form}, batch {batch}"
            ours = {run.round: run.drained for run in drains if run.name == name}
            kind = "fastest other, one at a time" if single else "fastest other"
            add(f"{name} / {kind}", ours, best([run for run in others if run.single or not single]), goals[0])
            pgmq = [run for run in drains if run.system == "pgmq" and run.single == single]
            add(f"{name} / pgmq, {batch} at once", ours, best(pgmq), goals[1])
    bulk = {
        system: {run.round: run.in_bulk for run in drains if run.system == system and run.tasks == most}
        for system in ("pgpark", "pgmq")
        for most in [max((run.tasks for run in drains if run.system == system), default=0)]
    }
    one = {system: {s.round: s.one_by_one for s in submits if s.system == system} for system in ("pgpark", "pgmq")}
    add("submit in bulk / pgmq.send_batch", bulk["pgpark"], bulk["pgmq"], "0.6")
    add("submit one by one / pgmq.send", one["pgpark"], one["pgmq"], "1.0")
    return report.table(rows) if len(rows) > 1 else ""


def best(runs: Sequence[Drain]) -> dict[int, float]:
    """The greatest drain of each round."""
    found: defaultdict[int, float] = defaultdict(float)
    for run in runs:
        found[run.round] = max(found[run.round], run.drained)
    return dict(found)


def by_name(drains: Sequence[Drain]) -> dict[str, list[Drain]]:
    found: defaultdict[str, list[Drain]] = defaultdict(list)
    for run in drains:
        found[run.name].append(run)
    return dict(found)


def plot(submits: Sequence[Submits], drains: Sequence[Drain], file: Path) -> None:
    from matplotlib import pyplot

    one = {s.system: [e.one_by_one for e in submits if e.system == s.system] for s in submits}
    panels: list[tuple[str, dict[str, list[float]]]] = [
        ("drain: tasks per second", {name: [run.drained for run in runs] for name, runs in by_name(drains).items()}),
        ("submit one by one: tasks per second", one),
    ]
    bars = [len(rates) for _, rates in panels]
    figure, shown = pyplot.subplots(
        2, 1, figsize=(11, 2 + 0.3 * sum(bars)), height_ratios=[max(count, 1) for count in bars], layout="constrained"
    )
    for axes, (title, rates) in zip(shown, panels, strict=True):
        names = list(rates)[::-1]
        middles = [statistics.median(rates[name]) for name in names]
        spans = [
            [middle - min(rates[name]) for name, middle in zip(names, middles, strict=True)],
            [max(rates[name]) - middle for name, middle in zip(names, middles, strict=True)],
        ]
        colours = ["tab:blue" if name.startswith("pgpark") else "tab:gray" for name in names]
        axes.barh(names, middles, xerr=spans, color=colours)
        axes.set(title=title, xscale="log")
        axes.grid(axis="x", alpha=0.4)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


# -- the command -----------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"), help="of a server; databases are made there")
    parser.add_argument("--systems", type=systems, default=SYSTEMS, help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--tasks", type=positive, default=TASKS, help="at most; slow systems get fewer, see the table")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--quick", action="store_true", help=f"one round of {QUICK_TASKS} tasks, no second workers")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the tables and the plot")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.tasks, chosen.rounds = QUICK_TASKS, 1
    return chosen


def systems(text: str) -> tuple[str, ...]:
    asked = tuple(text.split(","))
    if unknown := [system for system in asked if system not in SYSTEMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SYSTEMS)}")
    return asked


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def installed(chosen: argparse.Namespace) -> list[Peer]:
    """The forms to run; those that cannot run are named on standard error, a line for each reason."""
    found = peers(*chosen.systems)
    for reason in dict.fromkeys(reason for peer in found if (reason := peer.missing())):
        report.progress(f"left out: {reason}")
    return [peer for peer in found if not peer.missing() and not (chosen.quick and peer.workers > 1)]


def measure(
    admin: str, chosen: argparse.Namespace, forms: Sequence[Peer]
) -> tuple[list[Submits], list[Drain], list[str]]:
    """All rounds; what failed is said and left out."""
    submits: list[Submits] = []
    drains: list[Drain] = []
    failures: list[str] = []
    for nth, peer in report.turns(chosen.rounds, forms):
        try:
            if (nth, peer.system) not in {(each.round, each.system) for each in submits}:
                count = QUICK_ONE_BY_ONE if chosen.quick else min(ONE_BY_ONE, chosen.tasks)
                submits.append(submit_one_by_one(admin, peer, nth, count))
                report.progress(f"round {nth + 1}, {peer.system}: {submits[-1].one_by_one:,.0f}/s one by one")
            run = submit_and_drain(admin, peer, nth, min(chosen.tasks, peer.tasks))
            drains.append(run)
            report.progress(f"round {nth + 1}, {run.name}: {run.in_bulk:,.0f}/s in bulk, {run.drained:,.0f}/s drained")
        except (PeerError, psycopg.Error) as error:
            failures.append(f"round {nth + 1}, {peer.name}: {str(error).splitlines()[0]}")
            report.progress(f"failed: {failures[-1]}")
    return submits, drains, failures


def main() -> None:
    chosen = options()
    forms = installed(chosen)
    if not forms:
        sys.exit("nothing to measure")
    with chosen_server(chosen.dsn) as admin:
        _, settings = report.server_settings(admin)
        if not chosen.quick and (settings["fsync"], settings["synchronous_commit"]) != ("on", "on"):
            sys.exit("fsync and synchronous_commit must be on: what is measured is durable work")
        submits, drains, failures = measure(admin, chosen, forms)
        versions = list(dict.fromkeys(peer.version() for peer in forms))
        head = report.heading(admin, chosen.rounds, versions)
    order = {peer.name: place for place, peer in enumerate(forms)}
    drains.sort(key=lambda run: (order[run.name], run.round))
    place = {system: nth for nth, system in enumerate(SYSTEMS)}
    submits.sort(key=lambda each: (place[each.system], each.round))
    parts = [head, submit_table(submits, drains), drain_table(drains), ratio_table(submits, drains)]
    parts += ["Failed: " + "; ".join(failures) + ".\n"] if failures else []
    data = {
        "machine": report.machine(),
        "settings": settings,
        "versions": versions,
        "one_by_one": [asdict(each) for each in submits],
        "drains": [asdict(run) for run in drains],
        "failures": failures,
    }
    report.publish(
        chosen.out, "throughput", "\n".join(filter(None, parts)), data, lambda file: plot(submits, drains, file)
    )
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
