"""What bench/admission.py replays. Times are whole milliseconds, so that equal moments are equal.

kueue      what Kueue's scheduler test publishes: 30 queues of 20 units, here a pool each. In each queue, from time 0,
           a small task every 100 ms (350 of 1 unit for 0.2 s, low), a medium one every 500 ms (100 of 5 for 0.5 s,
           normal), a large one every 1200 ms (50 of 20 for 1 s, high): 1320 unit-seconds. From kubernetes-sigs/kueue,
           test/performance/scheduler/configs/baseline/generator.yaml; Kueue's own figures are the averages in
           rangespec.yaml beside it. They were taken by the clock on the wall, with a Kubernetes API server, and with
           borrowing between queues and preemption, which pgpark has not.
at once    the same tasks, all submitted at time 0.
mixed L    one pool of 24 units; costs uniform from 1 to 20, run times exponential with a mean of 10 s, Poisson arrivals
           of L times what the pool could do; one tenant sends 80 % of the tasks, two send 10 % each. One class.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

HEAVY, LIGHT = "heavy", ("light 1", "light 2")
KUEUE_SECS, KUEUE_USAGE, KUEUE_WAITS = 351.1, 0.587, {"high": 6.7, "normal": 76.8, "low": 215.5}


@dataclass(frozen=True)
class Task:
    """A task of a workload; times in milliseconds."""

    arrives: int
    runs: int
    units: int
    priority: str = "normal"
    tenant: str | None = None
    pool: int = 0


@dataclass(frozen=True)
class Workload:
    """What arrives, in order of arrival, at how many pools of how many units each."""

    name: str
    max_units: int
    pools: int
    tasks: list[Task]


def kueue(queues: int, at_once: bool = False) -> Workload:
    tasks = [
        Task(0 if at_once else interval * (nth + 1), runs, units, priority, pool=queue)
        for queue in range(queues)
        for count, interval, runs, units, priority in (
            (350, 100, 200, 1, "low"),
            (100, 500, 500, 5, "normal"),
            (50, 1200, 1000, 20, "high"),
        )
        for nth in range(count)
    ]
    return Workload("at once" if at_once else "kueue", 20, queues, sorted(tasks, key=lambda task: task.arrives))


def mixed(load: float, count: int, seed: int) -> Workload:
    dice = random.Random(seed)
    gap = 10.5 * 10_000 / (load * 24)  # mean units times mean milliseconds, by what the pool is to be loaded with
    now, tasks = 0.0, []
    for _ in range(count):
        now += dice.expovariate(1 / gap)
        runs = max(1, round(dice.expovariate(1 / 10_000)))
        (tenant,) = dice.choices((HEAVY, *LIGHT), (80, 10, 10))
        tasks.append(Task(round(now), runs, dice.randint(1, 20), tenant=tenant))
    return Workload(f"mixed {load:g}", 24, 1, tasks)


def floor(workload: Workload) -> float:
    """The least makespan that any schedule could have, in seconds; docs of admission.py."""
    least = max(task.arrives + task.runs for task in workload.tasks)
    for pool in range(workload.pools):
        work = 0
        for task in sorted((t for t in workload.tasks if t.pool == pool), key=lambda task: -task.arrives):
            work += task.units * task.runs
            least = max(least, task.arrives + math.ceil(work / workload.max_units))
    return least / 1000
