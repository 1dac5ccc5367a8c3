"""An hour of work in a few seconds: the scheduler's own functions, called by a clock that runs ahead."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb

from tests.conftest import Database

REASONS = ("CUDA out of memory", "upstream answered 502", "prompt too long")
WORKERS = ("gpu-1", "gpu-2", "gpu-3")
TENANTS = ("acme", "globex", "initech", "umbrella")
_CLOCK = """
create table if not exists public.clock (behind interval not null);
delete from public.clock;
insert into public.clock values (make_interval(secs => {secs}));
create or replace function pgpark._now() returns timestamptz language plpgsql volatile as
$$ begin return clock_timestamp() - (select behind from public.clock); end $$;"""


def an_hour(db: Database, pool: str, *, units: int, load: float = 0.82, step: float = 6.0, seed: int = 7) -> None:
    """Submits, claims and finishes for an hour that ends now, with units of 1 to a third of the pool."""
    dice = random.Random(seed)
    db.rows("select set_config('client_min_messages', 'warning', false)")
    db.connection.execute(_CLOCK.format(secs=3600).encode())
    costs = [cost for cost in (1, 1, 2, 2, 3, 4, 4, 6, 8) if cost * 3 <= units] or [1]
    mean = sum(costs) / len(costs)
    held: dict[int, tuple[int, float]] = {}  # attempt and when it ends, by task
    for beat in range(int(3600 / step)):
        at = beat * step
        db.connection.execute("update public.clock set behind = make_interval(secs => %s)", [3600 - at])
        busy = 0.55 if beat % 200 < 60 else 1.25  # the hour has its quiet times
        now = db.value("select pgpark._now()")
        wanted = dice.gauss(1, 0.6) * load * busy * units / mean * step / 45
        tasks = [_task(dice, costs, now) for _ in range(max(0, round(wanted)))]
        if tasks:
            db.rows("select from pgpark.park_submit_many(%s, %s)", pool, Jsonb(tasks))
        done = [task for task, (_, ends) in held.items() if ends <= at]
        if done:
            db.rows(
                "select from pgpark.park_finish_many(%s)", Jsonb([_outcome(dice, task, held[task][0]) for task in done])
            )
            for task in done:
                del held[task]
        for worker in WORKERS:
            for row in db.rows(
                "select task_id, attempt from pgpark.park_claim(%s, %s, 50, %s)", pool, worker, units // 2
            ):
                held[row["task_id"]] = (row["attempt"], at + dice.uniform(15, 75))
            mine = list(held)
            db.rows("select from pgpark.park_heartbeat(%s, %s, %s)", pool, worker, mine)
        if beat % 10 == 0:
            db.rows("select from pgpark.park_maintain(%s)", pool)
    db.connection.execute("update public.clock set behind = '0'")
    for worker in WORKERS:
        db.rows("select from pgpark.park_heartbeat(%s, %s, %s)", pool, worker, list(held))


def _task(dice: random.Random, costs: list[int], now: datetime) -> dict[str, Any]:
    task: dict[str, Any] = {
        "payload": {"prompt": "..."},
        "units": dice.choice(costs),
        "priority": dice.choices(("critical", "high", "normal", "low"), (1, 4, 10, 4))[0],
        "tenant": dice.choices(TENANTS, (5, 3, 2, 1))[0],
    }
    if dice.random() < 0.12:
        task["deadline"] = (now + timedelta(seconds=dice.uniform(60, 300))).isoformat()
    return task


def _outcome(dice: random.Random, task: int, attempt: int) -> dict[str, Any]:
    given: dict[str, Any] = {"task_id": task, "attempt": attempt}
    if dice.random() < 0.12:
        return given | {"status": "failed", "reason": dice.choices(REASONS, (5, 2, 1))[0]}
    return given | {"result": {"text": "..."}}
