"""What an old snapshot does to a queue: a steady load while another session holds one open, and after it lets go.

Run: python bench/horizon.py [--minutes 10] [--rate 800] [--recovery 60] [--systems pgpark,pgmq] [--rounds 1]
[--out build/bench] [--dsn DSN]; `--quick` takes seconds. Without a DSN on an embedded server of its own, fsync on.

Each system in turn gets an empty database, one worker process and one submitting process. A session of that database
begins a transaction (repeatable read, select 1) that stays open: nothing that dies from then on can be vacuumed away.
Then tasks are offered by the clock, a batch every 50 ms, whether or not they are worked off; a submit that is late is
made up for by a larger next one. After --minutes the transaction ends, and the load goes on for --recovery seconds.

Every --interval seconds a sample is taken:
backlog   tasks submitted less calls of the handler; the worker tells of every tenth, so watching costs nothing
claim     mean time on the server of the statements that take tasks (pg_stat_statements), also of those that found none
dead      dead tuples of all tables of the database, as the cumulative statistics have them
size      tables with their indexes

A system has kept up if its median backlog in the last minute of the held snapshot was at most what is offered in a
second, and what was offered was what should have been. It has recovered when its backlog is at most that again and a
claim takes at most twice what it took in the first interval. Autovacuum is on, with its default settings and those that
the systems set on their own tables.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg
from contenders import Contender, Failures, chosen_of, known, present, require_durable
from peers.base import Crew, Submitter
from peers.processes import PeerError
from psycopg.rows import DictRow
from report import heading, progress, publish, spread, table, turns
from samples import Run, Sample, Settings
from server import new_database

from pgpark.database import connect
from pgpark.embedded import EmbeddedServer

TICK_SECS = 0.05
STEP = 10  # the worker tells every so many calls


class Load(threading.Thread):
    """Offers `rate` tasks a second by the clock until it is stopped."""

    def __init__(self, submitter: Submitter, rate: float) -> None:
        super().__init__(daemon=True)
        self.offered = 0
        self.error: PeerError | None = None
        self._submitter, self._rate = submitter, rate
        self._stopped = threading.Event()

    def run(self) -> None:
        began, tick = time.monotonic(), 0
        try:
            while not self._stopped.is_set():
                due = int((time.monotonic() - began) * self._rate) - self.offered
                if due > 0:
                    self._submitter.submit(due)
                    self.offered += due
                tick = max(tick + 1, int((time.monotonic() - began) / TICK_SECS))
                self._stopped.wait(max(0.0, began + tick * TICK_SECS - time.monotonic()))
        except PeerError as error:
            self.error = error

    def stop(self) -> None:
        self._stopped.set()
        self.join()


class OldSnapshot:
    """A transaction that keeps its snapshot while the context is open, or until `release`."""

    def __init__(self, dsn: str) -> None:
        self._connection = connect(dsn)
        self._witness = connect(dsn)
        self._horizon: str | None = None

    def __enter__(self) -> OldSnapshot:
        self._connection.execute("begin isolation level repeatable read")
        self._connection.execute("select 1")
        self._horizon = self._held()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._witness.close()

    def release(self) -> None:
        """Ends the transaction. Raises RuntimeError if the server did not hold the same snapshot all the time."""
        if self._horizon is None or self._held() != self._horizon:
            raise RuntimeError("the old snapshot was lost on the way")
        self._connection.execute("rollback")

    def _held(self) -> str | None:
        """The oldest transaction that the server keeps dead tuples for on account of this session."""
        mine = "select backend_xmin::text as horizon from pg_stat_activity where pid = %s"
        row = self._witness.execute(mine, [self._connection.info.backend_pid]).fetchone()
        return row["horizon"] if row else None


class Watch:
    """Takes samples on a connection of its own."""

    def __init__(self, connection: psycopg.Connection[DictRow], claims: str) -> None:
        self._connection, self._claims = connection, claims
        self._counts = True
        try:
            connection.execute("create extension if not exists pg_stat_statements")
            self._claimed()
        except psycopg.Error:
            self._counts = False
            progress("no times of claims: the server has no pg_stat_statements in its shared_preload_libraries")

    def sample(self, at: float, held: bool, offered: int, crew: Crew) -> Sample:
        called = crew.called
        claims, claim_ms = self._claimed() if self._counts else (None, None)
        row = self._connection.execute("""
            select coalesce(sum(n_dead_tup), 0)::bigint as dead,
                   coalesce(sum(pg_total_relation_size(relid)), 0)::bigint as bytes
            from pg_stat_user_tables
            """).fetchone()
        assert row is not None
        return Sample(round(at, 2), held, offered, called, claims, claim_ms, row["dead"], row["bytes"])

    def _claimed(self) -> tuple[int, float]:
        row = self._connection.execute(
            """
            select coalesce(sum(s.calls), 0)::bigint as claims, coalesce(sum(s.total_exec_time), 0) as ms
            from pg_stat_statements s
            join pg_database d on d.oid = s.dbid
            where d.datname = current_database()
              and s.toplevel
              and s.query ~* %s
              and s.query !~ 'pg_stat_statements'
            """,
            [self._claims],
        ).fetchone()
        assert row is not None
        return row["claims"], round(row["ms"], 3)


def measure(server: str, contender: Contender, settings: Settings) -> Run:
    """One system from an empty database to its recovery."""
    peer, samples = contender.peer, []
    with contextlib.ExitStack() as open_:
        dsn = open_.enter_context(new_database(server))
        peer.install(dsn)
        watch = Watch(open_.enter_context(connect(dsn)), contender.claims)
        snapshot = open_.enter_context(OldSnapshot(dsn))
        submitter = open_.enter_context(peer.submitter(dsn))
        crew = open_.enter_context(peer.worker(dsn, "count", STEP))
        load = Load(submitter, settings.rate)
        crew.go()
        began = time.monotonic()
        load.start()
        open_.callback(load.stop)
        held, ends = True, settings.held_secs + settings.recovery_secs
        for nth in range(1, round(ends / settings.interval_secs) + 1):
            time.sleep(max(0.0, began + nth * settings.interval_secs - time.monotonic()))
            samples.append(watch.sample(time.monotonic() - began, held, load.offered, crew))
            crew.require_running()
            if load.error is not None:
                raise load.error
            if held and nth * settings.interval_secs >= settings.held_secs:
                held = False
                snapshot.release()
            say(contender, samples[-1], Run(contender, settings, samples))
    return Run(contender, settings, samples)


def say(contender: Contender, sample: Sample, run: Run) -> None:
    claim = run.claim_ms(sample.at, run.settings.interval_secs)
    progress(
        f"{contender.name}: {sample.at:6.1f} s {'held' if sample.held else 'free'}, backlog {sample.backlog:,},"
        f" claim {'?' if claim is None else format(claim, '.2f')} ms, {sample.dead_tuples:,} dead,"
        f" {sample.bytes / 1e6:,.0f} MB"
    )


def report(runs: Sequence[Run]) -> str:
    """The table, a row per system, and a verdict for each."""
    rows = [
        [
            "system",
            "done/s",
            "backlog",
            "claim ms, minute 1",
            "claim ms, end",
            "dead tuples",
            "MB",
            "seconds to recover",
        ]
    ]
    lines = []
    for contender, group in by_contender(runs):
        at_first, at_end = ([run.claim_ms(at) for run in group] for at in (60.0, group[0].settings.held_secs + 1))
        recovered = [run.recovered_after() for run in group]
        never = f"not within {group[0].settings.recovery_secs:g}"
        rows.append(
            [
                contender.name,
                spread([run.done_per_sec() for run in group]),
                spread([run.backlog() for run in group]),
                spread([took for took in at_first if took is not None], ".2f"),
                spread([took for took in at_end if took is not None], ".2f"),
                spread([run.held[-1].dead_tuples for run in group]),
                spread([run.held[-1].bytes / 1e6 for run in group]),
                never if None in recovered else spread([after for after in recovered if after is not None], ".0f"),
            ]
        )
        lines.append("- " + verdict(contender, group))
    return table(rows) + "\n" + "\n".join(lines) + "\n"


def verdict(contender: Contender, group: Sequence[Run]) -> str:
    settings = group[0].settings
    kept = sum(run.kept_up() for run in group)
    rounds = "" if len(group) == 1 else f" in {kept if kept else len(group)} of {len(group)} rounds"
    what = "kept up with" if kept else "fell behind"
    offered = spread([run.offered_per_sec() for run in group])
    return (
        f"{contender.name}: {what} {settings.rate:g} tasks/s after {settings.held_secs / 60:g} minutes{rounds}"
        f" (offered {offered} a second, median backlog of the last minute {spread([run.backlog() for run in group])})"
    )


def by_contender(runs: Sequence[Run]) -> Iterator[tuple[Contender, list[Run]]]:
    for name in dict.fromkeys(run.contender.name for run in runs):
        group = [run for run in runs if run.contender.name == name]
        yield group[0].contender, group


def as_data(run: Run, nth: int) -> dict[str, Any]:
    return {
        "system": run.contender.name,
        "round": nth,
        "kept_up": run.kept_up(),
        "backlog": run.backlog(),
        "recovered_after_secs": run.recovered_after(),
        "samples": [asdict(sample) | {"backlog": sample.backlog} for sample in run.samples],
    }


def plot(runs: Sequence[Run], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    for nth, (contender, group) in enumerate(by_contender(runs)):
        for place, run in enumerate(group):
            look: dict[str, Any] = {"color": f"C{nth}", "label": contender.name if place == 0 else None}
            times = [sample.at / 60 for sample in run.samples]
            above.plot(times, [sample.backlog for sample in run.samples], **look)
            took = [run.claim_ms(sample.at, run.settings.interval_secs) for sample in run.samples]
            below.plot(times, [float("nan") if one is None else one for one in took], **look)
    settings = runs[0].settings
    for axes in (above, below):
        axes.axvline(settings.held_secs / 60, color="grey", linestyle=":")
        axes.grid(alpha=0.3)
    above.set(ylabel="backlog, tasks", title=f"{settings.rate:g} tasks/s under a snapshot held until the dotted line")
    above.set_yscale("symlog", linthresh=100)
    above.set_ylim(0, 2 * max(settings.rate, *(sample.backlog for run in runs for sample in run.samples)))
    below.set(ylabel="claim, ms", xlabel="minutes", yscale="log")
    for axis in (above.yaxis, below.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    above.legend()
    figure.savefig(file, dpi=120)


@contextlib.contextmanager
def watched_server(dsn: str | None) -> Iterator[str]:
    """The DSN that was given, or that of an embedded server of its own with pg_stat_statements."""
    if dsn:
        yield dsn
        return
    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedServer(Path(home))
        with server.use() as embedded, connect(embedded) as connection:
            connection.execute("alter system set shared_preload_libraries = 'pg_stat_statements'")
        with server.use() as embedded:  # started anew
            yield embedded


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"), help="of a server; databases are made there")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the report")
    keys = known("horizon")
    parser.add_argument("--systems", type=chosen_of("horizon"), default=keys, help=f"of {','.join(keys)}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=800, help="tasks offered per second")
    parser.add_argument("--minutes", type=float, default=10, help="how long the snapshot is held")
    parser.add_argument("--recovery", type=float, default=60, help="seconds watched afterwards")
    parser.add_argument("--interval", type=float, default=5, help="seconds between samples")
    parser.add_argument("--quick", action="store_true", help="seconds: 200 tasks/s, held for 6 s, 3 s of recovery")
    chosen = parser.parse_args()
    if chosen.quick:
        parser.set_defaults(rate=200, minutes=0.1, recovery=3, interval=1)
        chosen = parser.parse_args()
    numbers = (chosen.rate, chosen.minutes, chosen.recovery, chosen.interval, chosen.rounds)
    if not all(0 < number < math.inf for number in numbers):
        parser.error("--rate, --minutes, --recovery, --interval and --rounds must be numbers above 0")
    if chosen.minutes * 60 < chosen.interval:
        parser.error("--minutes must be at least one --interval")
    return chosen


def main() -> None:
    chosen = options()
    settings = Settings(chosen.rate, chosen.minutes * 60, chosen.recovery, chosen.interval)
    contenders = present("horizon", chosen.systems)
    if not contenders:
        sys.exit("none of these systems is installed")
    runs: list[Run] = []
    numbered: list[dict[str, Any]] = []
    failures = Failures()
    with watched_server(chosen.dsn) as dsn:
        if not chosen.quick:
            require_durable(dsn)
        for nth, contender in turns(chosen.rounds, contenders):
            with failures.noted(nth, contender.name):
                runs.append(measure(dsn, contender, settings))
                numbered.append(as_data(runs[-1], nth))
        text = heading(dsn, chosen.rounds, list(dict.fromkeys(one.peer.version() for one in contenders)))
    runs.sort(key=lambda run: [one.name for one in contenders].index(run.contender.name))
    text += f"\n{settings.rate:g} tasks/s offered, a snapshot held for {chosen.minutes:g} minutes.\n\n"
    text += report(runs) + failures.line()
    data = {"settings": asdict(settings), "runs": numbered, "failures": failures}
    publish(chosen.out, "horizon", text, data, lambda file: plot(runs, file) if runs else None)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
