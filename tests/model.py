"""What starts in which order: pgpark over a list in memory, slow and meant to be read as the definition.

One pool; times are seconds since it was made. Each method of Model does what the SQL function of its name must do, and
returns what that must answer. Two things are left to the database: what exactly a backoff comes to (`Task.backoff`),
and which claim notices that a task cannot start any more (`Model.doom`), unless the task stands in front of all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from typing import NamedTuple

from tests.model_tasks import Draft, Pool, Shares, Task

WAITING = ("parked", "delayed")
HOLDING = ("running", "cancelling")
ENDED = ("completed", "failed", "expired", "dropped")
PURGE_PAUSE_SECS = 10  # between two looks at what was kept long enough


class Worker(NamedTuple):
    max_units: int | None
    seen_at: float


class Model:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.state = "active"
        self.now = 0.0
        self.tasks: list[Task] = []  # all that were accepted
        self.keys: dict[tuple[str | None, str], Task] = {}  # by tenant and key
        self.workers: dict[str, Worker] = {}
        self.tally: Counter[str] = Counter()
        self.shares = Shares()

    def all(self, *states: str) -> list[Task]:
        return [task for task in self.tasks if task.state in states]

    def used(self, tenant: str | None = None, worker: str | None = None) -> int:
        """Units held: by all, of one tenant, or by one worker."""
        held = [t for t in self.all(*HOLDING) if tenant in (None, t.tenant or "") and worker in (None, t.worker)]
        return sum(task.units for task in held)

    def free(self) -> int:
        return self.pool.max_units - self.used()

    # -- the line ------------------------------------------------------------------------------------------------------

    def parked(self) -> list[Task]:
        """The parked tasks in rank order."""
        return sorted(self.all("parked"), key=lambda task: (-task.priority, task.tag, task.id))

    def late(self, task: Task) -> bool:
        return task.deadline is not None and task.deadline <= self.now

    def doom(self, task: Task) -> tuple[str, str] | None:
        """The outcome of a waiting task that cannot start any more: out of the line, it ends when it is noticed."""
        if self.late(task):
            return "expired", "deadline_expired"
        return ("dropped", "too_large") if self.pool.fits_never(task) else None

    def line(self) -> list[Task]:
        """The parked tasks that are looked at: of a limited tenant, as many from the front as its limit lets run."""
        left = {name: (tenant.max_units or inf) - self.used(name) for name, tenant in self.pool.tenants.items()}
        line = []
        for task in self.parked():
            if not self.doom(task):
                left[task.flow[0]] = left.get(task.flow[0], inf) - task.units
                if left[task.flow[0]] >= 0:
                    line.append(task)
        return line

    def walk(self, free: float, largest: float = inf) -> Iterator[tuple[Task, str, Task | None]]:
        """What becomes of each parked task when so many units are free, and the head that it would pass."""
        line = self.line()
        head: Task | None = None
        passes = 0
        for task in self.parked():
            if self.doom(task):
                continue
            if self.state in ("paused", "disabled"):
                yield task, "paused", head
            elif task not in line:
                yield task, "tenant limit", head
            elif head and passes < 1:
                yield task, "held for head", head
            elif task.units <= min(free, largest):
                yield task, "may start", head
                free -= task.units
                passes -= 1
            else:
                yield task, "worker capacity" if task.units <= free else "no units", head
                if not head:
                    head, passes = task, self.pool.max_bypass - task.bypassed

    def explain(self) -> list[tuple[int, int | None, str]]:
        """(task, position, why) of the parked tasks in rank order, then of the delayed ones."""
        line = self.line()
        rows: list[tuple[int, int | None, str]] = []
        before: list[Task] = []
        for task, why, _ in self.walk(self.free(), self._largest_worker()):
            # Ahead are those in line and, if it is not in line itself, those of its tenant that wait with it.
            ahead = [t for t in before if t in line or (task not in line and t.flow[0] == task.flow[0])]
            rows.append((task.id, len(ahead), why))
            before.append(task)
        return rows + [(task.id, None, "delayed") for task in self.all("delayed")]

    def _largest_worker(self) -> float:
        """The most room on a live worker; no limit if one has none, or if nobody is there."""
        rooms = [(w.max_units or inf) - self.used(worker=name) for name, w in self.live_workers().items()]
        return max(rooms, default=inf)

    def live_workers(self) -> dict[str, Worker]:
        since = self.now - max(self.pool.lease_secs, 60)
        return {name: worker for name, worker in self.workers.items() if worker.seen_at > since}

    # -- submitting ----------------------------------------------------------------------------------------------------

    def submit(self, drafts: Iterable[Draft]) -> list[tuple[int | None, bool, str, str | None]]:
        """park_submit of one, park_submit_many of several: (task, accepted, status, reason) for each."""
        rows: list[tuple[Task, str | None]] = []
        acceptable: list[Task] = []
        for draft in drafts:
            task = self._drafted(draft)
            known = {(task.tenant, task.key): task for task in acceptable if task.key} | self.keys
            first = known.get((draft.tenant, draft.key)) if draft.key else None
            reason = "duplicate" if first else self._refusal(task)
            rows.append((first or task, reason))
            if reason is None:
                acceptable.append(task)
        full = self._without_room(acceptable)
        new = [task for task in acceptable if task not in full]
        for task in new:
            self.tasks.append(task)
            task.id = len(self.tasks)
            if task.key:
                self.keys[task.tenant, task.key] = task
        self._park([task for task in new if task.state == "parked"])
        rows = [(task, "queue_full" if task in full else reason) for task, reason in rows]
        return [
            (task.id, True, task.state, why) if why in (None, "duplicate") else (None, False, "rejected", why)
            for task, why in rows
        ]

    def _drafted(self, draft: Draft) -> Task:
        task = Task(**vars(draft))
        if draft.run_at is not None and draft.run_at > self.now:
            task.state = "delayed"
        if draft.deadline is None and self.pool.default_timeout_secs:
            task.deadline = max(self.now, draft.run_at or 0) + self.pool.default_timeout_secs
        return task

    def _refusal(self, task: Task) -> str | None:
        if self.state in ("draining", "disabled"):
            return "pool_closed"
        if self.pool.fits_never(task):
            return "too_large"
        start = max(self.now, task.run_at or 0) + self.pool.scheduling_slack_secs
        return "deadline_expired" if task.deadline is not None and task.deadline <= start else None

    def _without_room(self, newcomers: list[Task]) -> list[Task]:
        """The newcomers that find no place. With drop_lowest, parked tasks of a lower class make room for others."""
        if self.pool.max_queue_depth is None:
            return []
        places = max(0, self.pool.max_queue_depth - len(self.all(*WAITING)))
        if self.pool.overflow == "reject":
            return newcomers[places:]
        staying, full = list(newcomers), []
        for _ in newcomers[places:]:
            lowest = min(reversed(staying), key=lambda task: task.priority)  # of equal ones the last
            parked = self.parked()
            if parked and parked[-1].priority < lowest.priority:
                self.end(parked[-1], "dropped", "overflow")
            else:
                staying.remove(lowest)
                full.append(lowest)
        return full

    # -- parking -------------------------------------------------------------------------------------------------------

    def _park(self, batch: list[Task]) -> None:
        """Puts tasks in the line: new ones behind their tenant's others, the rest where they were."""
        if self.pool.fairness == "tenant":
            new = [task for task in batch if not task.stamped]
            self.shares.stamp(new, self.pool, [t for t in self.all("parked") if t not in batch], self.all(*HOLDING))
        for task in batch:
            self._let_go(task, "parked")
            task.tag = task.tag if self.pool.fairness == "tenant" else 0.0
            task.stamped = True
            task.run_at = None

    def _let_go(self, task: Task, state: str) -> None:
        task.state, task.worker, task.lease_until, task.run_until = state, None, inf, inf

    # -- claiming ------------------------------------------------------------------------------------------------------

    def claim(self, worker: str, max_tasks: int = 1, max_units: int | None = None) -> list[tuple[int, int]]:
        """(task, attempt) of what starts, in order."""
        self._expire()
        self._promote()
        self._reclaim()
        free = min(self.free(), (max_units or inf) - self.used(worker=worker))
        self._sweep(free)
        chosen = [(task, head) for task, why, head in self.walk(free) if why == "may start"][:max_tasks]
        for task, head in chosen:
            self._start(task, worker, in_order=head is None)
            if head:
                head.bypassed += 1
        self._see(worker, max_units)
        return [(task.id, task.attempt) for task, _ in chosen]

    def _sweep(self, free: float) -> None:
        """What cannot start any more does not hold up the lot: in front of all others it ends now."""
        for task in self.parked():
            doom = self.doom(task)
            if not doom or free < 1 or self.pool.limited(task) or self.state in ("paused", "disabled"):
                break
            self.end(task, *doom)

    def _start(self, task: Task, worker: str, in_order: bool) -> None:
        task.state, task.worker = "running", worker
        task.attempt += 1
        task.bypassed = 0
        task.lease_until = self.now + self.pool.lease_secs
        task.run_until = self.now + (self.pool.run_timeout_secs or inf)
        self.shares.start(task, self.pool, in_order)

    def _see(self, worker: str, max_units: int | None) -> None:
        """The worker is alive: noted every five seconds at most."""
        known = self.workers.get(worker)
        if not known or known.max_units != max_units or known.seen_at <= self.now - 5:
            self.workers[worker] = Worker(max_units, self.now)

    # -- running -------------------------------------------------------------------------------------------------------

    def _held(self, task_id: int, attempt: int) -> Task | None:
        """The task, if this attempt still holds it."""
        return next((t for t in self.all(*HOLDING) if (t.id, t.attempt) == (task_id, attempt)), None)

    def finish(self, task_id: int, attempt: int, status: str = "completed", reason: str | None = None) -> bool:
        """park_finish; park_finish_many is the same one by one."""
        task = self._held(task_id, attempt)
        if task and task.state == "cancelling" and status != "completed":
            self.end(task, "dropped", task.reason)
        elif task and status == "failed":
            self._fail(task, reason or ("run_timeout" if task.run_until <= self.now else None))
        elif task:
            self.end(task, status, reason)
        return task is not None

    def _fail(self, task: Task, reason: str | None) -> None:
        task.failures += 1
        if task.failures >= self.pool.max_attempts:
            return self.end(task, "failed", reason)
        backoff = self.pool.backoff_secs * self.pool.backoff_factor ** (task.failures - 1)
        task.backoff = min(backoff, self.pool.max_backoff_secs)
        task.run_at = self.now + task.backoff
        self._let_go(task, "delayed")
        self.tally["retried"] += 1
        return None

    def release(self, task_id: int, attempt: int) -> bool:
        task = self._held(task_id, attempt)
        if task and task.state == "cancelling":
            self.end(task, "dropped", task.reason)
        elif task:
            self._park([task])
        return task is not None

    def cancel(self, task_id: int, reason: str = "cancelled") -> str:
        task = self.tasks[task_id - 1]
        if task.state in WAITING:
            self.end(task, "dropped", reason)
            return "dropped"
        if task.state == "running":
            task.state, task.reason = "cancelling", reason
        return {"cancelling": "cancelling", "purged": "unknown"}.get(task.state, "finished")

    def heartbeat(self, worker: str, task_ids: Iterable[int]) -> set[int]:
        """Which of these tasks the worker should stop; the leases of those that it holds are renewed."""
        going_on = set()
        for task in (self.tasks[task_id - 1] for task_id in task_ids):
            if task.worker == worker and (task.state == "cancelling" or task.run_until > self.now):
                task.lease_until = self.now + self.pool.lease_secs
                going_on |= {task.id} if task.state == "running" else set()
        known = self.workers.get(worker)
        self._see(worker, known.max_units if known else None)
        return set(task_ids) - going_on

    def end(self, task: Task, state: str, reason: str | None) -> None:
        self._let_go(task, state)
        task.reason = reason
        task.ended_at, task.purge_at = self.now, self.now + (self.pool.ttl_secs or inf)
        self.tally[state] += 1

    # -- time ----------------------------------------------------------------------------------------------------------

    def maintain(self) -> tuple[int, int, int, int]:
        """How many expired, parked after their delay, were reclaimed and purged, in this order."""
        return self._expire(), self._promote(), self._reclaim(), self._purge()

    def prune(self) -> int:
        return self._expire()

    def _expire(self) -> int:
        late = [task for task in self.all(*WAITING) if self.late(task)]
        for task in late:
            self.end(task, "expired", "deadline_expired")
        return len(late)

    def _promote(self) -> int:
        due = [task for task in self.all("delayed") if (task.run_at or 0) <= self.now]
        self._park(sorted(due, key=lambda task: (task.run_at, task.id)))
        return len(due)

    def _reclaim(self) -> int:
        lapsed = [task for task in self.all(*HOLDING) if task.lease_until <= self.now]
        for task in lapsed:
            if task.state == "cancelling":
                self.end(task, "dropped", task.reason)
            elif task.run_until <= self.now:
                self._fail(task, "run_timeout")
            else:
                task.losses += 1
                self._park([task]) if task.losses < self.pool.max_losses else self.end(task, "dropped", "lost worker")
        return len(lapsed)

    def _purge(self) -> int:
        old = [task for task in self.all(*ENDED) if task.purge_at <= self.now]
        for task in old:
            task.state = "purged"
            self.keys = {key: first for key, first in self.keys.items() if first is not task}
        return len(old)

    def next_timer(self) -> float:
        """When a deadline, a delay, a lease or the keeping of an outcome ends next; inf for never."""
        starts = [task.run_at for task in self.all("delayed") if task.run_at is not None]
        deadlines = [task.deadline for task in self.all(*WAITING) if task.deadline is not None]
        purges = [max(task.purge_at, self.now + PURGE_PAUSE_SECS) for task in self.all(*ENDED)]
        return min([*starts, *deadlines, *(task.lease_until for task in self.all(*HOLDING)), *purges], default=inf)

    # -- the operator --------------------------------------------------------------------------------------------------

    def put_pool(self, pool: Pool) -> str:
        before, self.pool = self.pool, pool
        if pool == before:
            return "unchanged"
        if before.ttl_secs != pool.ttl_secs:
            for task in self.all(*ENDED):
                task.purge_at = task.ended_at + (pool.ttl_secs or inf)
        names = {*before.tenants, *pool.tenants}
        limits: list[tuple[float, float]] = [(before.max_units, pool.max_units)]
        limits += [(before.tenant(name).max_units or inf, pool.tenant(name).max_units or inf) for name in names]
        if any(now < then for then, now in limits):
            for task in self.all(*WAITING):
                if self.pool.fits_never(task):
                    self.end(task, "dropped", "too_large")
        self.shares.change(before, pool, self.parked())
        return "changed"
