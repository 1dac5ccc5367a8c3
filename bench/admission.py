"""How well pgpark admits: how full the pools are, how long each class waits, how fairly tenants are served.

Run: python bench/admission.py [--quick] [--out FOLDER] [--dsn DSN], without a DSN on an embedded server of its own;
either way in a new database that is dropped afterwards. Replays bench/workloads.py: the real SQL functions decide
(park_submit_many, park_claim, park_finish_many). Time is virtual: the schema's clock shows what this program sets, and
jumps from one arrival or end of a task to the next. So deciding takes no time, and what is measured is how good the
decisions are. With --real-time, the workloads of Kueue run by the clock on the wall.

Writes FOLDER/admission.md and, where matplotlib is installed (pip install 'pgpark[bench]'), FOLDER/admission.png.

makespan     seconds from time 0 to the end of the last task
of floor     floor / makespan, where the floor is what no schedule can beat: the greatest of t + (unit-seconds that
             arrive at t or later) / max_units over all times t, and of arrival + run time of each task
utilisation  unit-seconds used / (max_units x makespan)
wait         seconds from arrival to start: mean / 99th percentile (nearest rank)
Jain         (x1 + .. + xn)^2 / (n (x1^2 + .. + xn^2)): 1 if all n tenants fare alike, 1/n if one has everything
             (R. Jain, D. Chiu, W. Hawe: A Quantitative Measure of Fairness and Discrimination for Resource Allocation
             in Shared Computer Systems, DEC-TR-301, 1984). x is what a tenant got of what was due to it while the pool
             was contended, that is, while running and parked tasks of two or more tenants want more units than there
             are: its unit-seconds used, divided by the integral of its max-min fair share of max_units, given what each
             tenant wanted at each moment. Waits would not do for x: under fifo all wait alike, whatever they send.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb
from server import chosen_server
from workloads import HEAVY, KUEUE_SECS, KUEUE_USAGE, KUEUE_WAITS, LIGHT, Workload, floor, kueue, mixed

from pgpark.database import connect
from pgpark.migrate import migrate

CLASSES = ("high", "normal", "low")


class Lot:
    """The pools of one run, in a database whose clock shows what each session sets. Tasks go by their place."""

    def __init__(self, connection: psycopg.Connection[DictRow], workload: Workload, config: dict[str, Any]) -> None:
        self._connection = connection
        self._tasks = workload.tasks
        run = uuid.uuid4().hex[:12]
        self._pools = [f"bench_{run}_{pool}" for pool in range(workload.pools)]
        self._held: dict[int, tuple[int, int]] = {}  # place: task_id and attempt
        connection.execute("set synchronous_commit = off")
        self.set_clock(0)
        lasting = config | {"max_units": workload.max_units, "lease_secs": 1e8}  # there are no heartbeats
        for pool in self._pools:
            connection.execute("select pgpark.park_put_pool(%s, %s)", [pool, Jsonb(lasting)])

    def set_clock(self, now: int) -> None:
        self._connection.execute("select set_config('pgpark_bench.ms', %s, false)", [str(now)])

    def submit(self, places: Sequence[int]) -> None:
        batches = defaultdict(list)
        for place in places:
            task = self._tasks[place]
            batches[task.pool].append(
                {"payload": place, "units": task.units, "priority": task.priority, "tenant": task.tenant}
            )
        answers = self._connection.execute(
            "select s.* from unnest(%s::text[], %s::jsonb[]) as b (pool, tasks)"
            " cross join lateral pgpark.park_submit_many(b.pool, b.tasks) s",
            [[self._pools[pool] for pool in batches], [Jsonb(batch) for batch in batches.values()]],
        ).fetchall()
        check(all(answer["accepted"] for answer in answers), f"a task was refused: {answers}")

    def claim(self, pools: Iterable[int]) -> list[int]:
        """One claim in each of these pools; the places of the tasks that started."""
        started = self._connection.execute(
            "select c.task_id, c.attempt, c.payload from unnest(%s::text[]) as p (pool)"
            " cross join lateral pgpark.park_claim(p.pool, worker => 'bench', max_tasks => 1000000) c",
            [[self._pools[pool] for pool in sorted(pools)]],
        ).fetchall()
        self._held |= {row["payload"]: (row["task_id"], row["attempt"]) for row in started}
        return [row["payload"] for row in started]

    def finish(self, places: Sequence[int]) -> None:
        held = [self._held.pop(place) for place in places]
        outcomes = [{"task_id": task_id, "attempt": attempt} for task_id, attempt in held]
        answers = self._connection.execute("select * from pgpark.park_finish_many(%s)", [Jsonb(outcomes)]).fetchall()
        check(all(answer["accepted"] for answer in answers), f"an attempt was fenced off: {answers}")

    def close(self) -> None:
        for pool in self._pools:
            self._connection.execute("select pgpark.park_drop_pool(%s)", [pool])


def check(right: bool, complaint: str) -> None:
    if not right:
        raise RuntimeError(complaint)


@dataclass(frozen=True)
class Run:
    """What was asked and what came of it: when each task of the workload started and ended, in milliseconds."""

    workload: Workload
    fairness: str
    max_bypass: int
    starts: list[int]
    ends: list[int]

    @property
    def makespan(self) -> float:
        return max(self.ends) / 1000

    @property
    def utilisation(self) -> float:
        used = sum(task.units * task.runs for task in self.workload.tasks) / 1000
        return used / (self.workload.max_units * self.workload.pools * self.makespan)

    def waits(self, *of: str) -> list[float]:
        """Seconds from arrival to start, sorted; of all tasks, or of these classes or tenants."""
        timed = zip(self.workload.tasks, self.starts, strict=True)
        return sorted((start - t.arrives) / 1000 for t, start in timed if not of or t.priority in of or t.tenant in of)


def replay(dsn: str, workload: Workload, fairness: str, max_bypass: int, wall: bool = False) -> Run:
    """Sends a workload through a database made by `database`. wall: by the clock on the wall."""
    tasks = workload.tasks
    starts, ends = [-1] * len(tasks), [-1] * len(tasks)
    due = [(task.arrives, False, place) for place, task in enumerate(tasks)]  # time, whether it is an end, place
    heapq.heapify(due)
    with connect(dsn) as connection:
        lot = Lot(connection, workload, {"fairness": fairness, "max_bypass": max_bypass})
        began = time.monotonic()
        while due:
            now = due[0][0]
            if wall:
                time.sleep(max(0.0, began + now / 1000 - time.monotonic()))
                now = max(now, int((time.monotonic() - began) * 1000))
            lot.set_clock(now)
            happened: dict[bool, list[int]] = {False: [], True: []}
            while due and due[0][0] <= now:
                _, is_end, place = heapq.heappop(due)
                happened[is_end].append(place)
            if happened[False]:
                lot.submit(happened[False])
            if happened[True]:
                lot.finish(happened[True])
            touched = {tasks[place].pool for place in itertools.chain(*happened.values())}
            while touched:
                started = lot.claim(touched)
                at = int((time.monotonic() - began) * 1000) if wall else now
                for place in started:
                    starts[place], ends[place] = at, at + tasks[place].runs
                    heapq.heappush(due, (ends[place], True, place))
                touched = {tasks[place].pool for place in started}
        check(min(starts) >= 0, f"{starts.count(-1)} tasks never started")
        lot.close()
    run = Run(workload, fairness, max_bypass, starts, ends)
    check(most_used(run) <= workload.max_units, f"{most_used(run)} units of {workload.max_units} were in use")
    return run


def jain(run: Run) -> float | None:
    """Jain's index over what each tenant got of what was due to it, as above. None: never contended."""
    changes = []
    for task, start, end in zip(run.workload.tasks, run.starts, run.ends, strict=True):
        tenant = task.tenant or ""
        changes += [(task.arrives, tenant, task.units, 0), (start, tenant, 0, task.units)]
        changes += [(end, tenant, -task.units, -task.units)]
    wanted: Counter[str] = Counter()
    held: Counter[str] = Counter()
    got: defaultdict[str, float] = defaultdict(float)
    owed: defaultdict[str, float] = defaultdict(float)
    for change, following in itertools.pairwise(sorted(changes)):
        now, tenant, wants, holds = change
        wanted[tenant] += wants
        held[tenant] += holds
        wanting = {tenant: units for tenant, units in wanted.items() if units}
        if len(wanting) > 1 and sum(wanting.values()) > run.workload.max_units:
            for tenant, share in max_min(wanting, run.workload.max_units).items():
                owed[tenant] += share * (following[0] - now)
                got[tenant] += held[tenant] * (following[0] - now)
    fared = [got[tenant] / due for tenant, due in owed.items() if due]
    return sum(fared) ** 2 / (len(fared) * sum(x * x for x in fared)) if fared else None


def max_min(wanted: dict[str, int], available: float) -> dict[str, float]:
    """Max-min fair shares: nobody gets more than wanted, and what that leaves is shared evenly among the others."""
    shares: dict[str, float] = {}
    for served, (tenant, units) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        shares[tenant] = min(units, available / (len(wanted) - served))
        available -= shares[tenant]
    return shares


def most_used(run: Run) -> int:
    """The most units ever in use in one pool."""
    changes = []
    for task, start, end in zip(run.workload.tasks, run.starts, run.ends, strict=True):
        changes += [(task.pool, start, task.units), (task.pool, end, -task.units)]
    most = used = 0
    for _, _, units in sorted(changes):  # of one moment, what is freed comes first
        used += units
        most = max(most, used)
    return most


def p99(ranked: Sequence[float]) -> float:
    return ranked[math.ceil(len(ranked) * 0.99) - 1]


def spread(waits: Sequence[float]) -> str:
    return f"{statistics.fmean(waits):.1f} / {p99(waits):.1f}"


def common_cells(run: Run) -> list[str]:
    speed = floor(run.workload) / run.makespan
    return [f"{run.makespan:.1f}", f"{speed:.1%}", f"{run.utilisation:.1%}"]


def kueue_table(runs: Sequence[Run]) -> list[list[str]]:
    table = [["workload", "max_bypass", "makespan s", "of floor", "utilisation", *(f"{c} wait" for c in CLASSES)]]
    published = (f"{wait:.1f}" for wait in KUEUE_WAITS.values())
    table.append(["Kueue, as published", "", f"{KUEUE_SECS:.1f}", "", f"{KUEUE_USAGE:.1%}", *published])
    for run in runs:
        waits = (spread(run.waits(name)) for name in CLASSES)
        table.append([run.workload.name, str(run.max_bypass), *common_cells(run), *waits])
    return table


def mixed_table(runs: Sequence[Run]) -> list[list[str]]:
    head = ["workload", "fairness", "max_bypass", "makespan s", "of floor", "utilisation", "wait"]
    table = [[*head, "wait of heavy", "wait of light 1, 2", "Jain"]]
    for run in runs:
        waits = (spread(run.waits(*tenants)) for tenants in ((), (HEAVY,), LIGHT))
        index = jain(run)
        fared = "" if index is None else f"{index:.3f}"
        table.append([run.workload.name, run.fairness, str(run.max_bypass), *common_cells(run), *waits, fared])
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def plot(runs: Sequence[Run], file: Path) -> None:
    """Waits and utilisation over max_bypass; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (classes, full, tenants) = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    bars: dict[str, list[float]] = {"Kueue, as published": list(KUEUE_WAITS.values())}
    lines: defaultdict[str, list[float]] = defaultdict(list)
    waits: defaultdict[str, list[float]] = defaultdict(list)
    shown = list(dict.fromkeys(str(run.max_bypass) for run in runs))
    crowded = [run for run in runs if run.workload.pools == 1 and run.workload.tasks[0].tenant]
    for run in runs:
        if run.workload.name == "kueue":
            bars[f"max_bypass {run.max_bypass}"] = [statistics.fmean(run.waits(name)) for name in CLASSES]
    for run in crowded:
        lines[f"{run.workload.name}, {run.fairness}"].append(run.utilisation)
        if run.workload == crowded[-1].workload:
            waits[f"{run.fairness}, tenant of 80 %"].append(statistics.fmean(run.waits(HEAVY)))
            waits[f"{run.fairness}, tenants of 10 %"].append(statistics.fmean(run.waits(*LIGHT)))

    grouped_bars(classes, CLASSES, bars)
    classes.set(title="workload of Kueue's test: mean wait (s) by class", yscale="log")
    for name, line in lines.items():
        full.plot(shown, line, marker="o", label=name)
    full.set(title="one pool of 24 units, costs 1 to 20: utilisation", xlabel="max_bypass")
    grouped_bars(tenants, shown, waits)
    if crowded:
        full.legend()
        tenants.set(title=f"{crowded[-1].workload.name}: mean wait (s)", xlabel="max_bypass", yscale="log")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def grouped_bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    for nth, (name, values) in enumerate(series.items()):
        offset = (nth - (len(series) - 1) / 2) * 0.8 / len(series)
        axes.bar([group + offset for group in range(len(groups))], values, 0.8 / len(series), label=name)
    axes.set_xticks(range(len(groups)), groups)
    if series:
        axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


@contextlib.contextmanager
def database(dsn: str | None) -> Iterator[str]:
    """A new database, migrated, whose clock shows what its sessions set; gone afterwards."""
    with contextlib.ExitStack() as stack:
        dsn = stack.enter_context(chosen_server(dsn))
        name = f"pgpark_bench_{uuid.uuid4().hex[:12]}"
        admin = stack.enter_context(connect(dsn))
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        stack.callback(admin.execute, sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
        made = psycopg.conninfo.make_conninfo(dsn, dbname=name)
        with connect(made) as connection:
            migrate(connection)
            connection.execute(
                "create or replace function pgpark._now() returns timestamptz language plpgsql volatile as $$ begin"
                " return timestamptz '2000-01-01 00:00Z'"
                " + current_setting('pgpark_bench.ms')::bigint * interval '1 millisecond'; end $$"
            )
        yield made


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["kueue", "at-once", "mixed"]
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"), help="of a server; a database is made there")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the tables and the plot")
    parser.add_argument("--workloads", nargs="+", choices=known, default=["kueue", "mixed"])
    parser.add_argument("--max-bypass", nargs="+", type=int, default=[0, 2, 16, 64])
    parser.add_argument("--fair", nargs="+", choices=["fifo", "tenant"], default=["fifo", "tenant"], help="for mixed")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.8, 1.05], help="for mixed")
    parser.add_argument("--queues", type=int, default=30, help="for kueue and at-once")
    parser.add_argument("--tasks", type=int, default=1500, help="for mixed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real-time", action="store_true", help="kueue and at-once by the clock on the wall")
    parser.add_argument("--quick", action="store_true", help="seconds: 2 queues, 100 tasks, one load")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.queues, chosen.tasks, chosen.loads, chosen.max_bypass = 2, 100, [1.05], [0, 16]
    return chosen


def main() -> None:
    chosen = options()
    queued = [kueue(chosen.queues, name == "at-once") for name in chosen.workloads if name != "mixed"]
    crowded = [mixed(load, chosen.tasks, chosen.seed) for load in chosen.loads if "mixed" in chosen.workloads]
    asked = [(workload, "fifo", bypass, chosen.real_time) for workload in queued for bypass in chosen.max_bypass]
    asked += [(w, fair, bypass, False) for w in crowded for fair in chosen.fair for bypass in chosen.max_bypass]
    began = time.monotonic()
    with database(chosen.dsn) as dsn, ThreadPoolExecutor(1 if chosen.real_time else os.cpu_count()) as threads:
        runs = list(threads.map(lambda one: replay(dsn, *one), asked))
    tables = [kueue_table(runs[: len(queued) * len(chosen.max_bypass)])] if queued else []
    tables += [mixed_table(runs[-len(crowded) * len(chosen.fair) * len(chosen.max_bypass) :])] if crowded else []
    report = "\n".join(map(markdown, tables))
    print(report, end="")
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "admission.md").write_text(report)
    if importlib.util.find_spec("matplotlib"):
        plot(runs, chosen.out / "admission.png")
    else:
        print("no plot: that needs matplotlib; pip install 'pgpark[bench]'", file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s; written to {chosen.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
