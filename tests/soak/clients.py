"""The connections of a soak: each does at random what clients and workers do, and writes down what it was told.

A process runs several connections, a thread each. What a connection was told goes to a file of its own, a JSON array
a line, after the answer came; answers.py reads it. The kinds of lines, each with what follows the word:

submit   pool, a snapshot from before the call, [[task, accepted, reason, key], ...]
undone   [task, ...]                          submitted in a transaction that was rolled back
claim    pool, worker, [[task, attempt], ...]
finish   [[task, attempt, status, token, accepted, transaction], ...]
release  task, attempt, accepted, transaction
cancel   task, reason, answer
take     [[task, status, reason, payload], ...]   outcomes that this connection, and no other, took out of the mailbox
error    sqlstate, message
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from tests.soak.plan import LARGEST, TENANTS, Plan

XID = "pg_current_xact_id_if_assigned()::text::bigint"
PRIORITIES = ["low", "normal", "normal", "high", "critical"]


@dataclass(frozen=True)
class Shared:
    """What the processes know of each other."""

    accepted: SynchronizedArray[int]  # tasks, by connection; each writes its own place
    waiting: SynchronizedArray[int]  # tasks that wait in each pool, as of lately
    enough: Event  # no more submits; whatever is claimed is completed
    clearing: SynchronizedArray[int]  # 1 for each connection that has taken notice of that, or that has ended
    over: Event  # nothing is left


def run_process(dsn: str, plan: Plan, numbers: Sequence[int], shared: Shared, folder: Path) -> None:
    """Runs these connections until it is over."""
    threads = [threading.Thread(target=Client(dsn, plan, number, shared, folder).run) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Client:
    """One connection."""

    def __init__(self, dsn: str, plan: Plan, number: int, shared: Shared, folder: Path) -> None:
        self.number, self.plan, self.shared = number, plan, shared
        self.dice = random.Random(plan.seed * 1000 + number)
        self.worker = plan.worker(number)
        self.capacity = plan.workers()[self.worker]
        self.pools = list(plan.pools())
        self.held: dict[tuple[int, int], str] = {}  # (task, attempt): pool
        self.late: list[tuple[float, int, int]] = []  # when to come back to (task, attempt), which may be lost by then
        self.known: deque[int] = deque(maxlen=300)
        self.full = dict.fromkeys(self.pools, 0.0)  # until when not to ask again
        self.beaten = 0.0
        self.dsn, self.log = dsn, (folder / f"{number}.jsonl").open("w")
        self.calls = 0

    def run(self) -> None:
        actions = [self.submit] * 30 + [self.claim] * 28 + [self.finish] * 24 + [self.finish_late] * 4
        actions += [self.release] * 3 + [self.cancel] * 3 + [self.abandon] * 3 + [self.maintain, self.take, self.undo]
        with self.log, psycopg.connect(self.dsn, autocommit=True) as self.connection:
            self.connection.execute("set lock_timeout = '50s'")  # a wait that should not be is told as an error
            (now,) = self.connection.execute("select clock_timestamp()").fetchone() or ()
            self.skew = now - datetime.now(timezone.utc)
            while not self.shared.over.is_set() and not self.connection.closed:
                try:
                    if time.monotonic() > self.beaten + 0.4:
                        self.heartbeat()
                    if self.shared.enough.is_set():
                        self.clear()
                    else:
                        self.dice.choice(actions)()
                except psycopg.Error as error:
                    self.tell("error", error.sqlstate, str(error))
                except Exception as error:
                    self.tell("error", "", repr(error))
                    break
        self.shared.clearing[self.number] = 1

    def tell(self, kind: str, *what: Any) -> None:
        self.log.write(json.dumps([kind, *what]) + "\n")

    def rows(self, statement: str, *parameters: Any) -> list[Any]:
        """Calls; sometimes in a transaction that is held open for a while, so that others meet it half done."""
        if self.dice.random() >= self.plan.held_open:
            return self.connection.execute(statement, parameters, prepare=True).fetchall()
        with self.connection.transaction():
            rows = self.connection.execute(statement, parameters, prepare=True).fetchall()
            time.sleep(self.dice.uniform(0, 0.02))
        return rows

    # What clients do.

    def draft(self) -> dict[str, Any]:
        dice = self.dice
        self.calls += 1
        task: dict[str, Any] = {
            "payload": [self.number, self.calls],
            "units": dice.randint(1, LARGEST),
            "priority": dice.choice(PRIORITIES),
            "tenant": dice.choice(TENANTS),
        }
        if dice.random() < 0.2:
            task["deadline"] = self.after(dice.uniform(-0.05, 3))
        if dice.random() < 0.1:
            task["run_at"] = self.after(dice.uniform(-0.1, 1.5))
        if dice.random() < 0.05:
            task["idempotency_key"] = f"key {dice.randrange(self.plan.admissions // 50)}"
        return task

    def after(self, seconds: float) -> str:
        time_: datetime = datetime.now(timezone.utc) + self.skew + timedelta(seconds=seconds)
        return time_.isoformat()

    def submit(self) -> None:
        pool = self.dice.choice(self.pools)
        if self.shared.waiting[self.pools.index(pool)] > self.plan.waiting or time.monotonic() < self.full[pool]:
            return
        drafts = [self.draft() for _ in range(self.batch())]
        answer = "pg_current_snapshot()::text, t.task_id, t.accepted, t.reason"
        if len(drafts) > 1:
            rows = self.rows(f"select {answer} from pgpark.park_submit_many(%s, %s) t", pool, Jsonb(drafts))
        else:
            named = drafts[0] | {"payload": Jsonb(drafts[0]["payload"])}
            listed = ", ".join(f"{name} => %s" for name in named)
            rows = self.rows(f"select {answer} from pgpark.park_submit(%s, {listed}) t", pool, *named.values())
        keys = [
            f"{draft['idempotency_key']} of {draft['tenant'] or ''}" if "idempotency_key" in draft else None
            for draft in drafts
        ]
        self.tell("submit", pool, rows[0][0], [[*row[1:], key] for row, key in zip(rows, keys, strict=True)])
        if any(row[3] == "queue_full" for row in rows):
            self.full[pool] = time.monotonic() + self.dice.uniform(0, 0.2)
        taken = [row[1] for row in rows if row[2] and row[3] is None]
        self.known.extend(taken[-10:])
        self.shared.accepted[self.number] += len(taken)

    def batch(self) -> int:
        return 1 if self.dice.random() < 0.1 else self.dice.randint(1, 100)

    def undo(self) -> None:
        """Submits in a transaction and rolls it back."""
        drafts = Jsonb([self.draft() for _ in range(self.dice.randint(1, 20))])
        statement = "select task_id from pgpark.park_submit_many(%s, %s) where accepted and reason is null"
        with self.connection.transaction(force_rollback=True):
            rows = self.connection.execute(statement, [self.dice.choice(self.pools), drafts]).fetchall()
        self.tell("undone", [task for (task,) in rows])

    def cancel(self) -> None:
        choice = list(self.held) if self.dice.random() < 0.3 else [(task, 0) for task in self.known]
        if choice:
            task, _ = self.dice.choice(choice)
            self.calls += 1
            reason = f"cancel {self.number}.{self.calls}"
            ((answer,),) = self.rows("select pgpark.park_cancel(%s, %s)", task, reason)
            self.tell("cancel", task, reason, answer)

    def take(self) -> None:
        """Reads messages of a tenant and takes them out; another connection may be doing the same."""
        tenant = self.dice.choice(TENANTS[:-1])
        rows = self.rows(
            "select m.task_id, m.status, m.reason, m.payload, pgpark.park_ack(array[m.message_id])"
            " from pgpark.park_fetch(%s, max_messages => %s) m",
            tenant,
            self.dice.randint(1, 20),
        )
        self.tell("take", [row[:4] for row in rows if row[4] == 1])

    # What workers do.

    def claim(self) -> None:
        pool = self.dice.choice(self.pools)
        rows = self.rows(
            "select task_id, attempt from pgpark.park_claim(%s, %s, %s, %s)",
            pool,
            self.worker,
            self.batch(),
            self.capacity,
        )
        if rows:
            self.tell("claim", pool, self.worker, rows)
            self.held |= {(task, attempt): pool for task, attempt in rows}
        else:
            self.shared.over.wait(self.dice.uniform(0, 0.02))  # rather than ask again at once

    def finish(self) -> None:
        held = list(self.held)
        self.end(self.dice.sample(held, self.dice.randint(0, len(held))))

    def finish_late(self) -> None:
        """Finishes attempts that were abandoned or lost, whose leases may have lapsed by now."""
        self.end(self.overdue())

    def overdue(self, most: int = 1000) -> list[tuple[int, int]]:
        due = [late for late in self.late if late[0] < time.monotonic()][:most]
        self.late = [late for late in self.late if late not in due]
        return [(task, attempt) for _, task, attempt in due]

    def let_go(self, key: tuple[int, int]) -> None:
        del self.held[key]
        self.late.append((time.monotonic() + self.dice.uniform(0, 2.5), *key))

    def end(self, attempts: list[tuple[int, int]]) -> None:
        if not attempts:
            return
        if self.dice.random() < 0.1:
            attempts = [*attempts, self.dice.choice(attempts)]  # the same one twice
        statuses = ["completed"] if self.shared.enough.is_set() else ["completed"] * 16 + ["failed"] * 3 + ["dropped"]
        outcomes: list[list[Any]] = []
        for task, attempt in attempts:
            self.calls += 1
            token = f"{self.number}.{self.calls}"
            outcomes.append([task, attempt, self.dice.choice(statuses), token])
        if len(outcomes) > 1:
            keys = ("task_id", "attempt", "status", "result")
            given = Jsonb([dict(zip(keys, outcome, strict=True)) for outcome in outcomes])
            rows = self.rows(f"select accepted, {XID} from pgpark.park_finish_many(%s)", given)
        else:
            given = Jsonb(outcomes[0][3])
            rows = self.rows(f"select pgpark.park_finish(%s, %s, %s, %s), {XID}", *outcomes[0][:3], given)
        self.tell("finish", [[*outcome, *row] for outcome, row in zip(outcomes, rows, strict=True)])
        for ended in attempts:
            self.held.pop(ended, None)

    def release(self) -> None:
        """Some of its own, and some that it may have lost."""
        for task, attempt in [*list(self.held)[: self.dice.randint(0, 5)], *self.overdue(most=5)]:
            (answer,) = self.rows(f"select pgpark.park_release(%s, %s), {XID}", task, attempt)
            self.tell("release", task, attempt, *answer)
            self.held.pop((task, attempt), None)

    def abandon(self) -> None:
        """Forgets some attempts, as a worker does that died; finishes them later, when that may be refused."""
        for key in list(self.held)[: self.dice.randint(0, 20)]:
            self.let_go(key)

    def heartbeat(self) -> None:
        self.beaten = time.monotonic()
        for pool in self.pools:
            mine = [task for (task, _), held_in in self.held.items() if held_in == pool]
            if mine:
                rows = self.rows("select pgpark.park_heartbeat(%s, %s, %s)", pool, self.worker, mine)
                stop = {task for (task,) in rows}
                for key in [key for key, held_in in self.held.items() if held_in == pool and key[0] in stop]:
                    self.let_go(key)

    def maintain(self) -> None:
        self.rows("select * from pgpark.park_maintain(%s)", self.dice.choice([*self.pools, None]))

    def clear(self) -> None:
        """The end: everything that can be claimed is completed."""
        self.shared.clearing[self.number] = 1
        self.claim()
        self.end(list(self.held))
        self.finish_late()
