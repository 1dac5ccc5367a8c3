"""Random histories, run through tests/model.py and the database side by side: they must agree after every step.

`pytest -n 2 tests/test_model.py --model-steps 100000` runs longer; `--hypothesis-seed` repeats a run. A failing history
is made short before it is shown, with the model's view at the difference. Tasks are numbered as they were accepted.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from math import inf
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from tests import accounts
from tests.conftest import Database
from tests.histories import History, Step, histories, shown
from tests.model import ENDED, HOLDING, WAITING, Model
from tests.model_tasks import Draft, Pool, Task

LENGTH = 60  # steps of one history
PARTS = 4  # tests that are alike, so that several processes share the work

BEGIN = datetime(2030, 1, 1, tzinfo=timezone.utc)
PRIORITIES = ("low", "normal", "high", "critical")
OBSERVE = """
select
  (select coalesce(json_agg(json_build_array(
       t.task_id, s.status, s.reason, s.attempt, t.bypassed, t.worker,
       extract(epoch from t.lease_until - %(begin)s), extract(epoch from t.run_at - %(begin)s), s."position")), '[]')
   from pgpark.task t, pgpark.park_status(t.task_id) s
   where t.task_id = any (%(ids)s)),
  (select coalesce(json_agg(json_build_array(m.task_id, m.status, m.reason, m.attempt)), '[]')
   from pgpark.mailbox m
   where m.task_id = any (%(ids)s)),
  (select coalesce(json_agg(json_build_array(e.task_id, e."position", e.why)), '[]')
   from pgpark.park_explain(%(pool)s, 1000) e),
  (select to_json(s) from pgpark.park_stats(%(pool)s) s),
  (select pgpark._used_units(p.pool_id) from pgpark.pool p where p.name = %(pool)s),
  (select coalesce(json_object_agg(w.worker, w.units), '{}')
   from (select y.worker, sum(y.units) as units
         from pgpark.tally y join pgpark.pool p using (pool_id)
         where p.name = %(pool)s and y.worker is not null
         group by 1 having sum(y.units) <> 0) w)
"""
RAISE_OFTEN = "create or replace function pgpark._stride() returns int language sql immutable as 'select 1'"
NEXT_LAPSE = """
select extract(epoch from f.next_lapse - %s)::float8
from pgpark.front f
join pgpark.pool p using (pool_id)
where p.name = %s
"""


def at(seconds: float | None) -> datetime | None:
    return None if seconds is None else BEGIN + timedelta(seconds=seconds)


def text(seconds: float | None) -> str | None:
    return None if seconds is None else (BEGIN + timedelta(seconds=seconds)).isoformat()


def config(pool: Pool) -> Jsonb:
    """The argument of park_put_pool."""
    given = {name: value for name, value in vars(pool).items() if value not in (None, {})}
    retry = ("max_attempts", "max_losses", "backoff_secs", "backoff_factor", "max_backoff_secs")
    given["audit"] = True
    given["retry"] = {name: given.pop(name) for name in retry}
    given["mailbox"] = {"ttl_secs": given.pop("ttl_secs", None)}
    if pool.tenants:
        limits = {name: tenant._asdict() for name, tenant in pool.tenants.items()}
        given["tenants"] = {n: {k: v for k, v in limit.items() if v is not None} for n, limit in limits.items()}
    return Jsonb(given)


class Sides:
    """A fresh pool and its model. Each step is done on both, and what they answer compared."""

    def __init__(self, db: Database, pool: Pool) -> None:
        self.name = f"m{uuid.uuid4().hex[:12]}"
        self.cursor = db.connection.cursor(row_factory=tuple_row)
        self.model = Model(pool)
        self.ids: list[int] = []  # of the model's tasks, in the database
        self.cursor.execute("update pgpark._test_clock set now = %s", [BEGIN])
        self.cursor.execute(RAISE_OFTEN)
        self.call("park_put_pool", self.name, config(pool))

    def close(self) -> None:
        assert self.cursor.execute(accounts.AUDIT.encode()).fetchall() == []
        self.call("park_drop_pool", self.name, True)
        self.cursor.execute("delete from pgpark.mailbox where pool = %s", [self.name])  # the next purge counts its own

    def do(self, step: Step) -> None:
        if getattr(self, step.name)(**step.arguments) is not NotImplemented:  # else there was no task to do it with
            self.compare()

    # -- what clients do -----------------------------------------------------------------------------------------------

    def submit(self, drafts: list[Draft]) -> Any:
        if len(self.model.all(*WAITING, *HOLDING)) > 25:
            return NotImplemented
        drafts = [replace(d, deadline=self.later(d.deadline), run_at=self.later(d.run_at)) for d in drafts]
        wanted = self.model.submit(drafts)
        got = self._submit(drafts[0]) if len(drafts) == 1 else self._submit_many(drafts)
        self.same("submit", [row[1:] for row in got], [row[1:] for row in wanted])
        self.ids += sorted({row[0] for row in got if row[0]} - set(self.ids))
        return self.same("submit: ids", [row[0] and self.number(row[0]) for row in got], [row[0] for row in wanted])

    def _submit(self, draft: Draft) -> list[Any]:
        statement = (
            "select * from pgpark.park_submit(%s, '{}', %s, %s, tenant => %s, deadline => %s, run_at => %s,"
            " idempotency_key => %s)"
        )
        deadline, run_at = at(draft.deadline), at(draft.run_at)
        word = PRIORITIES[draft.priority]
        return self.rows(statement, self.name, word, draft.units, draft.tenant, deadline, run_at, draft.key)

    def _submit_many(self, drafts: list[Draft]) -> list[Any]:
        elements: list[dict[str, Any]] = [
            {
                "payload": {},
                "units": draft.units,
                "priority": PRIORITIES[draft.priority],
                "tenant": draft.tenant,
                "deadline": text(draft.deadline),
                "run_at": text(draft.run_at),
                "idempotency_key": draft.key,
            }
            for draft in drafts
        ]
        return self.rows("select * from pgpark.park_submit_many(%s, %s)", self.name, Jsonb(elements))

    def cancel(self, pick: int, reason: str | None) -> Any:
        if not (task := latest(self.model.tasks, pick)):
            return NotImplemented
        got = self.call("park_cancel", self.ids[task.id - 1], reason)
        return self.same("cancel", got, self.model.cancel(task.id, reason or "cancelled"))

    # -- what workers do -----------------------------------------------------------------------------------------------

    def claim(self, worker: str, max_tasks: int, max_units: int | None) -> None:
        statement = "select task_id, attempt from pgpark.park_claim(%s, %s, %s, %s)"
        got = self.rows(statement, self.name, worker, max_tasks, max_units)
        wanted = self.model.claim(worker, max_tasks, max_units)
        self.same("claim", [(self.number(task_id), attempt) for task_id, attempt in got], wanted)

    def finish(self, pick: int, status: str, reason: str | None) -> Any:
        if not (task := latest(self.model.all(*HOLDING), pick)):
            return NotImplemented
        got = self.call("park_finish", self.ids[task.id - 1], task.attempt, status, None, reason)
        return self.same("finish", got, self.model.finish(task.id, task.attempt, status, reason))

    def finish_many(self, ends: list[tuple[int, int, str, str | None]]) -> Any:
        """Any tasks, whether they run or not: the present attempt, the one before, the next."""
        if not self.model.tasks:
            return NotImplemented
        chosen = [(latest(self.model.tasks, pick), *rest) for pick, *rest in ends]
        named = [(task.id, max(0, task.attempt - ago), *rest) for task, ago, *rest in chosen]
        keys = ("task_id", "attempt", "status", "reason")
        elements = [dict(zip(keys, (self.ids[task - 1], *rest), strict=True)) for task, *rest in named]
        got = self.rows("select accepted from pgpark.park_finish_many(%s)", Jsonb(elements))
        return self.same("finish_many", [row[0] for row in got], [self.model.finish(*end) for end in named])

    def release(self, pick: int, ago: int) -> Any:
        if not (task := latest(self.model.all(*HOLDING), pick)):
            return NotImplemented
        attempt = task.attempt - ago
        got = self.call("park_release", self.ids[task.id - 1], attempt)
        return self.same("release", got, self.model.release(task.id, attempt))

    def heartbeat(self, worker: str, picks: list[int]) -> None:
        tasks = [task.id for pick in picks if (task := latest(self.model.tasks, pick))]
        statement = "select * from pgpark.park_heartbeat(%s, %s, %s::bigint[])"
        got = self.rows(statement, self.name, worker, [self.ids[task - 1] for task in tasks])
        self.same("heartbeat", {self.number(task_id) for (task_id,) in got}, self.model.heartbeat(worker, tasks))

    # -- what time and the operator do ---------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        self.model.now += seconds
        self.cursor.execute("update pgpark._test_clock set now = %s", [at(self.model.now)])

    def maintain(self) -> None:
        statement = "select expired, promoted, reclaimed, purged, next_due from pgpark.park_maintain(%s)"
        *got, next_due = self.rows(statement, self.name)[0]
        self.same("maintain", tuple(got), self.model.maintain())
        self.compare()
        timer = self.model.next_timer()
        soon = min(timer, self.model.now + 1)  # while a task could start
        could_start = any(why == "may start" for _, why, _ in self.model.walk(self.model.free()))
        due = inf if next_due is None else (next_due - BEGIN).total_seconds()
        # A lease may be looked after too early: the one that was noted may have been renewed, or its task ended.
        noted = self.rows(NEXT_LAPSE, BEGIN, self.name)[0][0]
        early = [noted] if self.model.all(*HOLDING) and self.model.now < noted < timer else []
        if due > soon if could_start else due not in (*early, timer, soon):
            self.same("next_due", due, soon if could_start else timer)

    def prune(self) -> None:
        self.same("prune", self.call("park_prune", self.name), self.model.prune())

    def change(self, setting: tuple[str, Any]) -> None:
        name, value = setting
        self._put(replace(self.model.pool, **{name: value}))

    def change_tenant(self, name: str, setting: tuple[str, Any]) -> None:
        key, value = setting
        changed = self.model.pool.tenant(name)._replace(**{key: value})
        self._put(replace(self.model.pool, tenants=self.model.pool.tenants | {name: changed}))

    def _put(self, pool: Pool) -> None:
        self.same("put_pool", self.call("park_put_pool", self.name, config(pool)), self.model.put_pool(pool))

    def set_state(self, state: str) -> None:
        self.call("park_set_pool_state", self.name, state)
        self.model.state = state

    # -- comparing -----------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        parameters = {"begin": BEGIN, "pool": self.name, "ids": self.ids}
        ((live, ended, explained, stats, booked, by_worker),) = self.cursor.execute(OBSERVE, parameters).fetchall()
        seen = {self.number(task): tuple(rest) for task, *rest in sorted(live)}
        outcomes = {self.number(task): tuple(rest) for task, *rest in sorted(ended)}
        self._learn({task: row[6] for task, row in seen.items()}, outcomes)
        self.same(
            "live tasks: status, reason, attempt, bypassed, worker, lease_until",
            {task: row[:6] for task, row in seen.items()},
            {task.id: _row(task) for task in self.model.all(*WAITING, *HOLDING)},
        )
        self.same("outcomes", outcomes, {t.id: (t.state, t.reason, t.attempt) for t in self.model.all(*ENDED)})
        self._compare_order([(self.number(task), *rest) for task, *rest in explained], seen)
        wanted = self._stats()
        self.same("stats", {name: stats[name] for name in wanted}, wanted)
        self.same("units in use", booked, self.model.used())
        workers = {task.worker for task in self.model.all(*HOLDING)}
        self.same("units by worker", by_worker, {worker: self.model.used(worker=worker) for worker in workers})

    def _learn(self, run_at: dict[int, Any], outcomes: dict[int, Any]) -> None:
        """What the model leaves to the database: how much is taken off a backoff, and when a doomed task ends."""
        for task in self.model.tasks:
            if task.backoff is not None:
                waits = run_at[task.id] - self.model.now
                if not 0.75 * task.backoff <= waits <= task.backoff:
                    self.same(f"backoff of {task.id}", waits, task.backoff)
                task.run_at, task.backoff = run_at[task.id], None
            doom = self.model.doom(task)
            if doom and task.state in WAITING and task.id in outcomes:
                self.model.end(task, *doom)

    def _compare_order(self, explained: list[tuple[Any, ...]], seen: dict[int, Any]) -> None:
        wanted = self.model.explain()
        parked = sum(why != "delayed" for _, _, why in wanted)
        self.same("explain", explained[:parked], wanted[:parked])
        self.same("explain, delayed", sorted(explained[parked:]), wanted[parked:])
        expected: dict[int, Any] = {task: position for task, position, _ in wanted}
        for task in self.model.parked():
            if task.id in expected:
                self.same(f"position of {task.id}", seen[task.id][-1], expected[task.id])

    def _stats(self) -> dict[str, Any]:
        model = self.model
        pool = {"state": model.state, "max_units": model.pool.max_units, "used_units": model.used()}
        live = {"running": len(model.all(*HOLDING))} | {state: len(model.all(state)) for state in WAITING}
        return pool | live | {"workers": len(model.live_workers())} | {n: model.tally[n] for n in (*ENDED, "retried")}

    def same(self, what: str, database: Any, model: Any) -> None:
        if database != model:
            raise AssertionError(f"{what}\n  database: {database}\n  model:    {model}\n{self._view()}")

    def _view(self) -> str:
        lines = [f"The model at {self.model.now:g} s, {self.model.state}, {shown(self.model.pool)}"]
        for task in self.model.tasks:
            known = {name: value for name, value in vars(task).items() if value not in (None, 0, inf)}
            lines.append("  " + " ".join(f"{name}={value}" for name, value in known.items()))
        return "\n".join(lines)

    # -- small things --------------------------------------------------------------------------------------------------

    def rows(self, statement: str, *parameters: Any) -> list[Any]:
        return self.cursor.execute(statement, parameters).fetchall()

    def call(self, function: str, *parameters: Any) -> Any:
        return self.rows(f"select pgpark.{function}({', '.join(['%s'] * len(parameters))})", *parameters)[0][0]

    def number(self, task_id: int) -> int:
        """The model's number of a task of the database."""
        return self.ids.index(task_id) + 1

    def later(self, seconds: float | None) -> float | None:
        return None if seconds is None else self.model.now + seconds


def latest(tasks: list[Task], pick: int) -> Any:
    return tasks[-1 - pick % len(tasks)] if tasks else None


def _row(task: Task) -> tuple[Any, ...]:
    lease = task.lease_until if task.state in HOLDING else None
    return task.state, task.reason, task.attempt, task.bypassed, task.worker, lease


@pytest.mark.parametrize("part", range(PARTS))
def test_the_database_does_what_the_model_says(db: Database, pytestconfig: pytest.Config, part: int) -> None:  # noqa: ARG001
    db.freeze()
    examples = max(1, pytestconfig.getoption("--model-steps") // LENGTH // PARTS)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(histories(LENGTH))
    def agree(history: History) -> None:
        sides = Sides(db, history.pool)
        try:
            for step in history.steps:
                sides.do(step)
        finally:
            sides.close()

    agree()
