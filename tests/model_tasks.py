"""What tests/model.py is about: pools, tasks, and the start tags by which the tenants of a pool share it fairly."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

Flow = tuple[str, int]  # what has a place of its own in fair sharing: a tenant's tasks of one class (priority)


class Tenant(NamedTuple):
    weight: float = 1
    max_units: int | None = None  # a tenant that has them is limited


@dataclass(frozen=True)
class Pool:
    """The settings of a pool, under the names of the config file."""

    max_units: int = 8
    max_queue_depth: int | None = None
    overflow: str = "reject"
    max_bypass: int = 0
    fairness: str = "fifo"
    tenants: dict[str, Tenant] = field(default_factory=dict)
    default_timeout_secs: float | None = None
    scheduling_slack_secs: float = 0
    lease_secs: float = 30
    run_timeout_secs: float | None = None
    max_attempts: int = 1
    max_losses: int = 3
    backoff_secs: float = 1
    backoff_factor: float = 2
    max_backoff_secs: float = 300
    ttl_secs: float | None = None

    def tenant(self, name: str | None) -> Tenant:
        return self.tenants.get(name or "", Tenant())

    def limited(self, task: Draft) -> bool:
        return self.tenant(task.tenant).max_units is not None

    def fits_never(self, task: Draft) -> bool:
        return task.units > min(self.max_units, self.tenant(task.tenant).max_units or inf)

    def cost(self, task: Draft) -> float:
        """How much of its tenant's share a task uses up."""
        return task.units / self.tenant(task.tenant).weight


@dataclass(eq=False)
class Draft:
    """A task as it is asked for."""

    units: int = 1
    priority: int = 1  # 0 low ... 3 critical
    tenant: str | None = None
    deadline: float | None = None
    run_at: float | None = None
    key: str | None = None


@dataclass(eq=False)
class Task(Draft):
    id: int = 0  # it was the id-th that was accepted
    state: str = "parked"
    reason: str | None = None  # of the outcome, or of the cancel under way
    tag: float = 0.0  # start tag: its place in its class, in a pool that shares fairly
    stamped: bool = False  # whether it has been given one
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    bypassed: int = 0
    worker: str | None = None
    lease_until: float = inf
    run_until: float = inf
    ended_at: float = inf
    purge_at: float = inf
    backoff: float | None = None  # it waits for that long or up to a quarter less: run_at is the database's to choose

    @property
    def flow(self) -> Flow:
        return self.tenant or "", self.priority


class Shares:
    """Start-time fair queueing: what a tenant's next task is stamped with, and what is remembered for that."""

    def __init__(self) -> None:
        self.started: dict[Flow, float] = {}  # the greatest tag that ever started in order,
        self.finished: dict[Flow, float] = {}  # and the greatest tag + cost

    def start(self, task: Task, pool: Pool, in_order: bool) -> None:
        if in_order:  # not past a head
            self.started[task.flow] = max(self.started.get(task.flow, 0.0), task.tag)
        self.finished[task.flow] = max(self.finished.get(task.flow, 0.0), task.tag + pool.cost(task))

    def stamp(self, batch: list[Task], pool: Pool, parked: list[Task], running: list[Task]) -> None:
        """Gives new tasks their places: each flow's in their order, behind what the tenant has parked or used already,
        and not before the virtual time of the class. parked, running: the other tasks of the pool."""
        for flow in {task.flow for task in batch}:
            own = sorted((task.tag, task.id, pool.cost(task)) for task in parked if task.flow == flow)
            behind_own = own[-1][0] + own[-1][2] if own else 0.0
            base = max(self._virtual_time(flow[1], pool, parked, running), self.finished.get(flow, 0.0), behind_own)
            chain(base, [task for task in batch if task.flow == flow], pool)

    def _virtual_time(self, priority: int, pool: Pool, parked: list[Task], running: list[Task]) -> float:
        front = [task.tag for task in parked if task.priority == priority and not pool.limited(task)]
        busy = front or any(task.priority == priority for task in running) or any(map(pool.limited, parked))
        if busy:
            reached = [tag for flow, tag in self.started.items() if flow[1] == priority]
            return max(min(front, default=0.0), max(reached, default=0.0))
        return max((tag for flow, tag in self.finished.items() if flow[1] == priority), default=0.0)

    def change(self, before: Pool, pool: Pool, parked: list[Task]) -> None:
        """The pool changed; parked: its tasks in rank order."""
        if pool.fairness != before.fairness:
            self.started, self.finished = {}, {}
        for flow in {task.flow for task in parked}:
            tasks = [task for task in parked if task.flow == flow]
            if pool.fairness == "fifo":
                for task in tasks:
                    task.tag = 0.0
            elif before.fairness == "fifo":
                chain(0.0, tasks, pool)
            elif pool.tenant(flow[0]).weight != before.tenant(flow[0]).weight:
                chain(tasks[0].tag, tasks, pool)


def chain(base: float, tasks: list[Task], pool: Pool) -> None:
    """Places tasks one behind the other."""
    costs = 0.0
    for task in tasks:
        task.tag = base + costs
        costs += pool.cost(task)
