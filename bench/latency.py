"""How soon an idle worker starts a task, and how soon a waiting client has its result.

Run: python bench/latency.py [--rounds 3] [--tasks 300] [--systems pgpark,pgqueuer] [--out build/bench] [--dsn DSN];
`--quick` takes seconds. Without a DSN on an embedded server of its own, fsync on.

Each system in turn, in every round, gets an empty database, one submitting process and one worker process that has
nothing else to do. Tasks are submitted one by one, at random moments, each when the one before was done; a system that
takes long gets as many as fit into --seconds. Three moments are taken by the clock that all processes of a machine
share: the call of submit, its return (the task is committed), and the first line of the handler.

from commit   return of submit to the handler's first line. A worker can be quicker than the answer to the submitter.
from call     call of submit to the handler's first line, with the commit.
x NOTIFY      their medians by that of a bare NOTIFY in the same round: from its call to its arrival in another process
              that listens with the same kind of connection; there, not there and back. Peers are compared with the one
              on asyncio.

The second table is pgpark's alone: a client waits for the result in this process.
from handler  the handler's line to the return of the wait: finish, its commit, notification, look-up.
as a whole    call of submit to the return of the wait.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from contenders import Contender, Failures, chosen_of, known, present, require_durable
from peers.base import PAYLOAD, Crew, now
from peers.notify import BareNotify
from peers.pgpark import POOL, PgparkWorker
from peers.processes import PeerError
from report import heading, percentile, progress, publish, spread, table, turns
from server import chosen_server, new_database

from pgpark import Client, build_pools, calls

WARM_UP = 10  # tasks that are not counted
PAUSE_SECS = (0.02, 0.06)  # between tasks: long enough for a worker to fall idle
MOST_TIMES_NOTIFY, MOST_MS = 3, 20  # what pgpark is to reach: the median from commit, the 99th percentile
BARE = {
    "asyncio": Contender("notify", BareNotify("NOTIFY, to an asyncio connection", listener="asyncio", insert=False)),
    "plain": Contender(
        "notify", BareNotify("NOTIFY, to a plain connection", listener="plain", insert=False), listener="plain"
    ),
}
WITH_ROW = Contender("notify", BareNotify("NOTIFY with a row, to asyncio", listener="asyncio", insert=True))
WAITERS = ("Pool.result", "Client.wait")


class Delay(NamedTuple):
    """Milliseconds that a task took: since it was committed (or since its handler), and since submit was called."""

    after: float
    whole: float


Delays = list[Delay]
Figures = dict[str, dict[int, Delays]]  # by system or waiter, and round


def wake_ups(server: str, contender: Contender, tasks: int, secs: float) -> Delays:
    """Of one system in a new database: commit, and call, to the handler's first line."""
    peer = contender.peer
    with new_database(server) as dsn:
        peer.install(dsn)
        with peer.submitter(dsn) as submitter, peer.worker(dsn, "stamp") as crew:
            crew.go()

            def one() -> Delay:
                began, ended = submitter.submit_one_by_one(1)
                started = crew.next_stamp()
                return Delay((started - ended) / 1e6, (started - began) / 1e6)

            return repeat(one, tasks, secs)


def answers(server: str, tasks: int, secs: float) -> dict[str, Delays]:
    """Of clients that wait for the results of `pgpark worker`: the handler's line, and submit, to the result."""
    peer = PgparkWorker("pgpark worker", batch=8)
    with contextlib.ExitStack() as open_:
        dsn = open_.enter_context(new_database(server))
        peer.install(dsn)
        crew = open_.enter_context(peer.worker(dsn, "stamp"))
        pools = open_.enter_context(build_pools({"pools": {POOL: {"max_units": 1000}}}, dsn=dsn))
        client = open_.enter_context(Client(dsn))
        crew.go()

        def by_pool() -> Delay:
            pool = pools[POOL]
            return timed(crew, lambda: pool.submit(PAYLOAD).task_id, lambda task: pool.result(task, timeout=30))

        def by_client() -> Delay:
            call = calls.submit(POOL, PAYLOAD)
            return timed(crew, lambda: client.run(call).task_id, lambda task: client.wait(task, timeout=30))

        return {
            name: repeat(one, tasks, secs / len(WAITERS))
            for name, one in zip(WAITERS, (by_pool, by_client), strict=True)
        }


def timed(crew: Crew, submit: Callable[[], int | None], wait: Callable[[int], object]) -> Delay:
    began = now()
    task = submit()
    if task is None or wait(task) is None:
        raise PeerError(f"task {task} has no result after 30 s")
    ended = now()
    return Delay((ended - crew.next_stamp()) / 1e6, (ended - began) / 1e6)


def repeat(one: Callable[[], Delay], tasks: int, secs: float) -> Delays:
    """Up to `tasks` of them, as many as fit into `secs` seconds, at least one."""
    for _ in range(min(WARM_UP, tasks)):
        pause()
        one()
    delays: Delays = []
    until = time.monotonic() + secs
    while len(delays) < tasks and (not delays or time.monotonic() < until):
        pause()
        delays.append(one())
    return delays


def pause() -> None:
    time.sleep(random.uniform(*PAUSE_SECS))


def wake_up_table(figures: Figures, contenders: Sequence[Contender]) -> str:
    rows = [
        [
            "system",
            "tasks",
            "from commit p50",
            "p99",
            "x NOTIFY",
            "from call p50",
            "p99",
            "x NOTIFY",
        ]
    ]
    for contender in contenders:
        rounds = figures[contender.name].values()
        rows.append(
            [
                contender.name,
                str(sum(map(len, rounds))),
                *shown([[delay.after for delay in one] for one in rounds]),
                spread(times_notify(figures, contender, "after"), ".1f"),
                *shown([[delay.whole for delay in one] for one in rounds]),
                spread(times_notify(figures, contender, "whole"), ".1f"),
            ]
        )
    return table(rows)


def answer_table(figures: Figures) -> str:
    rows = [["waiting by", "tasks", "from handler p50", "p99", "as a whole p50", "p99"]]
    for name in WAITERS:
        rounds = figures[name].values()
        rows.append(
            [
                name,
                str(sum(map(len, rounds))),
                *shown([[delay.after for delay in one] for one in rounds]),
                *shown([[delay.whole for delay in one] for one in rounds]),
            ]
        )
    return table(rows)


def verdict(figures: Figures, contenders: Sequence[Contender]) -> str:
    """How far pgpark is from its target figures."""
    lines = []
    for contender in contenders:
        ratios = times_notify(figures, contender, "after")
        if contender.key not in ("pgpark", "pgpark-sql") or not ratios:
            continue
        times = statistics.median(ratios)
        rounds = figures[contender.name].values()
        ms = statistics.median(percentile([delay.whole for delay in one], 0.99) for one in rounds)
        lines.append(
            f"- {contender.name}: median from commit {times:.1f} x NOTIFY (to reach: at most {MOST_TIMES_NOTIFY},"
            f" {reached(times <= MOST_TIMES_NOTIFY)}); 99th percentile from call {ms:.1f} ms (to reach: under"
            f" {MOST_MS}, {reached(ms < MOST_MS)})\n"
        )
    return "".join(lines)


def reached(yes: bool) -> str:
    return "reached" if yes else "missed"


def shown(rounds: Collection[Sequence[float]]) -> tuple[str, str]:
    return (
        spread([percentile(one, 0.5) for one in rounds], ".2f"),
        spread([percentile(one, 0.99) for one in rounds], ".2f"),
    )


def median(delays: Delays, field: str) -> float:
    return statistics.median(float(getattr(delay, field)) for delay in delays)


def times_notify(figures: Figures, contender: Contender, field: str) -> list[float]:
    """The median of a system by that of the bare NOTIFY, for each round that has both."""
    bare = figures[BARE[contender.listener].name]
    return [
        median(one, field) / median(bare[nth], "whole") for nth, one in figures[contender.name].items() if nth in bare
    ]


def plot(figures: Figures, contenders: Sequence[Contender], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True, layout="constrained")
    for axes, field, title in zip(panels, ("after", "whole"), ("from commit", "from the call of submit"), strict=True):
        greys, colours = iter(("black", "dimgrey", "darkgrey")), (f"C{nth}" for nth in itertools.count())
        for contender in contenders:
            taken = sorted(getattr(delay, field) for one in figures[contender.name].values() for delay in one)
            shares = [(nth + 1) / len(taken) for nth in range(len(taken))]
            style = ":" if contender.key == "notify" else "-"
            colour = next(greys if contender.key == "notify" else colours)
            places = [max(one, 0.01) for one in taken]
            axes.step(places, shares, style, color=colour, where="post", label=contender.name)
        axes.set(xscale="log", xlabel="ms", title=f"{title} to the handler's first line")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of tasks")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=120)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"), help="of a server; databases are made there")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the report")
    keys = known("latency")
    parser.add_argument("--systems", type=chosen_of("latency"), default=keys, help=f"of {','.join(keys)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=300, help="most tasks for each system and round")
    parser.add_argument("--seconds", type=float, default=30, help="longest time for each system and round")
    parser.add_argument("--quick", action="store_true", help="seconds: pgpark alone, one round of 10 tasks")
    chosen = parser.parse_args()
    if chosen.quick:
        parser.set_defaults(rounds=1, tasks=10, systems=("pgpark", "pgpark-sql"))
        chosen = parser.parse_args()
    if not all(0 < number < math.inf for number in (chosen.rounds, chosen.tasks, chosen.seconds)):
        parser.error("--rounds, --tasks and --seconds must be numbers above 0")
    return chosen


def main() -> None:
    chosen = options()
    systems = present("latency", chosen.systems)
    if not systems:
        sys.exit("none of these systems is installed")
    contenders = [*BARE.values(), WITH_ROW, *systems]
    figures: Figures = defaultdict(dict)
    failures = Failures()
    with chosen_server(chosen.dsn) as dsn:
        if not chosen.quick:
            require_durable(dsn)
        for nth, contender in turns(chosen.rounds, [*contenders, None]):
            with failures.noted(nth, contender.name if contender else "waiting for results"):
                if contender is None:
                    taken = answers(dsn, chosen.tasks, chosen.seconds)
                else:
                    taken = {contender.name: wake_ups(dsn, contender, chosen.tasks, chosen.seconds)}
                for name, delays in taken.items():
                    figures[name][nth] = delays
                    say(nth, name, delays)
        text = heading(dsn, chosen.rounds, list(dict.fromkeys(one.peer.version() for one in contenders)))
    contenders = [one for one in contenders if figures[one.name]]
    text += "\nMilliseconds until the handler's first line, the worker being idle:\n\n"
    text += wake_up_table(figures, contenders)
    text += "\nMilliseconds until a client that waits has the result of `pgpark worker`:\n\n" + answer_table(figures)
    text += "\n" + verdict(figures, contenders) + failures.line()
    data = {name: {nth: rounded(delays) for nth, delays in rounds.items()} for name, rounds in figures.items()}
    publish(chosen.out, "latency", text, data, lambda file: plot(figures, contenders, file))
    if failures:
        sys.exit(1)


def rounded(delays: Delays) -> list[list[float]]:
    return [[round(ms, 3) for ms in delay] for delay in delays]


def say(nth: int, name: str, delays: Delays) -> None:
    progress(f"round {nth + 1}, {name}: {len(delays)} tasks, median {median(delays, 'whole'):.2f} ms as a whole")


if __name__ == "__main__":
    main()
