"""Many connections at once: 20,000 tasks of random cost, and no pool or worker ever over its capacity."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database, wait_for

TASKS = 20_000
POOLS = {"one": 200, "two": 120}
WORKERS = {f"w{number}": 30 + 5 * number for number in range(8)}


def work(db: Database, worker: str, left: Counter[str], failures: list[BaseException]) -> None:
    """Claims, holds some for a while, finishes in random batches, releases a few; until both pools are empty."""
    dice = random.Random(worker)
    held: list[tuple[int, int]] = []
    try:
        while any(left.values()) and not failures:
            pool = dice.choice(list(POOLS))
            held += [
                (row["task_id"], row["attempt"])
                for row in db.claim(pool, worker=worker, max_tasks=dice.randint(1, 30), max_units=WORKERS[worker])
            ]
            dice.shuffle(held)
            done, held = held[: (count := dice.randint(0, len(held)))], held[count:]
            if done and dice.random() < 0.1:
                db.value("select pgpark.park_release(%s, %s)", *done.pop())
            rows = db.rows(
                "select accepted from pgpark.park_finish_many(%s)",
                Jsonb([{"task_id": task, "attempt": attempt} for task, attempt in done]),
            )
            assert all(row["accepted"] for row in rows)
            if not done:
                left.update({pool: 0 for pool in POOLS})
                for name in POOLS:
                    left[name] = db.value(
                        "select count(*) from pgpark.task join pgpark.pool p using (pool_id) where p.name = %s", name
                    )
    except BaseException as error:
        failures.append(error)


@pytest.mark.slow
def test_no_pool_and_no_worker_is_ever_over_capacity(db: Database, connect: Callable[[], Database]) -> None:
    dice = random.Random(1)
    for pool, units in POOLS.items():
        db.pool(pool, max_units=units, max_bypass=4)
        for _ in range(TASKS // len(POOLS) // 1000):
            tasks = [
                {"payload": 1, "units": dice.randint(1, 16), "priority": dice.choice(["low", "normal", "high"])}
                for _ in range(1000)
            ]
            db.rows("select from pgpark.park_submit_many(%s, %s)", pool, Jsonb(tasks))

    left, failures = Counter(POOLS.keys()), []
    threads = [
        threading.Thread(target=work, args=(connect(), worker, left, failures), daemon=True) for worker in WORKERS
    ]
    for thread in threads:
        thread.start()
    looks = 0

    def checked() -> bool:
        """The ninth: each look is one snapshot, the state at some commit."""
        nonlocal looks
        looks += 1
        for row in db.rows(
            "select p.name, t.worker, sum(t.units) as units from pgpark.task t join pgpark.pool p using (pool_id)"
            " where t.state in ('running', 'cancelling') group by grouping sets ((p.name), (p.name, t.worker))"
        ):
            limit = POOLS[row["name"]] if row["worker"] is None else WORKERS[row["worker"]]
            assert row["units"] <= limit, row
        return not any(thread.is_alive() for thread in threads)

    wait_for(checked, seconds=300)
    assert not failures, failures[0]
    assert looks > 100
    audit(db)


def audit(db: Database) -> None:
    """Every step, from the outcomes: at each start, what overlaps it fits; and each task has one outcome.

    A task is taken to hold its units from its last start to its outcome, both timed before their commits; so no
    overlap is seen that was not there.
    """
    rows = db.rows("select task_id, pool, worker, units, started_at, created_at from pgpark.mailbox")
    assert len(rows) == len({row["task_id"] for row in rows}) == TASKS
    assert db.value("select count(*) from pgpark.task") == 0
    assert db.value("select sum(completed) from pgpark.park_stats()") == TASKS
    steps = sorted(
        [(row["started_at"], 1, row) for row in rows] + [(row["created_at"], 0, row) for row in rows],
        key=lambda step: step[:2],
    )
    used: dict[str | tuple[str, str], int] = defaultdict(int)
    most: dict[str, int] = defaultdict(int)
    for _, starts, row in steps:
        units = row["units"] if starts else -row["units"]
        used[row["pool"]] += units
        used[row["pool"], row["worker"]] += units
        assert used[row["pool"]] <= POOLS[row["pool"]], row
        assert used[row["pool"], row["worker"]] <= WORKERS[row["worker"]], row
        most[row["pool"]] = max(most[row["pool"]], used[row["pool"]])
    for pool, units in POOLS.items():
        assert most[pool] > 0.9 * units, f"{pool} was never near its capacity, so this proves little: {most[pool]}"
