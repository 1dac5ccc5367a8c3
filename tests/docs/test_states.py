"""The states of docs/concepts.md: table and picture say the same, and that is what the functions do and no more."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Database
from tests.docs.markdown import ROOT

STATES = {"submit", "parked", "delayed", "running", "cancelling", "completed", "failed", "expired", "dropped"}
Step = tuple[str, str]
_WATCH = """
create table pgpark._test_steps (task_id bigint, before text, after text);
create function pgpark._test_watch() returns trigger language plpgsql as $$
begin
  if tg_table_name = 'task' then
    insert into pgpark._test_steps
    values (new.task_id, case tg_op when 'INSERT' then 'submit' else old.state end, new.state);
  else  -- an outcome; the state before is that of the last step
    insert into pgpark._test_steps
    select new.task_id, s.after, new.status
    from pgpark._test_steps s where s.task_id = new.task_id order by s.ctid desc limit 1;
  end if;
  return null;
end $$;
create trigger _test_watch after insert or update of state on pgpark.task
  for each row execute function pgpark._test_watch();
create trigger _test_watch after insert on pgpark.mailbox for each row execute function pgpark._test_watch();
"""


def _table() -> set[Step]:
    _, _, section = (ROOT / "docs" / "concepts.md").read_text().partition("\n## The states of a task\n")
    rows = re.findall(r"^\| ([a-z, ]+) \| ([a-z]+) \| .+ \|$", section.partition("\n## ")[0], re.MULTILINE)
    return {(before, after) for many, after in rows[1:] for before in many.split(", ")}


def _picture() -> set[Step]:
    root = ElementTree.parse(Path(ROOT, "docs", "states.svg")).getroot()
    paths = [element for element in root.iter() if "data-from" in element.attrib]
    return {(before, path.attrib["data-to"]) for path in paths for before in path.attrib["data-from"].split()}


@pytest.fixture
def watched(db: Database) -> Iterator[Database]:
    """A database with a clock that stands still, where every change of a state is written down."""
    db.freeze()
    db.connection.execute(_WATCH)
    yield db


def _steps(db: Database) -> set[Step]:
    rows = db.rows("select distinct before, after from pgpark._test_steps where before is distinct from after")
    return {(row["before"], row["after"]) for row in rows}


def test_table_and_picture_say_the_same() -> None:
    assert _table() == _picture()
    assert {state for step in _table() for state in step} == STATES


# -- each of them happens -------------------------------------------------------------------------------------------


def _running(db: Database) -> int:
    task = db.parked()
    assert db.claimed() == [task]
    return task


def _delayed(db: Database, seconds: float = 60) -> int:
    row = db.submit(run_at=db.after(seconds), deadline=db.after(seconds + 60))
    assert row["status"] == "delayed"
    return int(row["task_id"])


def _cancelling(db: Database) -> int:
    task = _running(db)
    assert db.value("select pgpark.park_cancel(%s)", task) == "cancelling"
    return task


def _runs_again(db: Database) -> None:
    db.pool(retry={"max_attempts": 2})
    db.finish(_running(db), status="failed")


def _is_late(db: Database, task: int) -> None:
    db.advance(3600)
    db.maintain()
    assert db.status(task)["status"] == "expired"


def _comes_true(db: Database) -> None:
    task = _delayed(db)
    db.advance(61)
    db.maintain()
    assert db.status(task)["status"] == "parked"


def _release(db: Database) -> None:
    assert db.value("select pgpark.park_release(%s, 1)", _running(db))


HAPPENS: dict[Step, Callable[[Database], object]] = {
    ("submit", "parked"): lambda db: db.parked(),
    ("submit", "delayed"): _delayed,
    ("delayed", "parked"): _comes_true,
    ("parked", "running"): _running,
    ("running", "parked"): _release,
    ("running", "delayed"): _runs_again,
    ("running", "cancelling"): _cancelling,
    ("running", "completed"): lambda db: db.finish(_running(db)),
    ("running", "failed"): lambda db: db.finish(_running(db), status="failed"),
    ("running", "dropped"): lambda db: db.finish(_running(db), status="dropped"),
    ("cancelling", "completed"): lambda db: db.finish(_cancelling(db)),
    ("cancelling", "dropped"): lambda db: db.finish(_cancelling(db), status="failed"),
    ("parked", "expired"): lambda db: _is_late(db, db.parked(deadline=db.after(60))),
    ("delayed", "expired"): lambda db: _is_late(db, _delayed(db)),
    ("parked", "dropped"): lambda db: db.value("select pgpark.park_cancel(%s)", db.parked()),
    ("delayed", "dropped"): lambda db: db.value("select pgpark.park_cancel(%s)", _delayed(db)),
}


def test_each_step_of_the_picture_happens(watched: Database) -> None:
    assert set(HAPPENS) == _table()
    for step, happen in HAPPENS.items():
        watched.connection.execute("truncate pgpark._test_steps")
        watched.pool()
        happen(watched)
        assert step in _steps(watched), f"{step[0]} to {step[1]} was not seen"
        watched.rows("select pgpark.park_drop_pool('gpu', true)")


# -- and nothing else -----------------------------------------------------------------------------------------------


def test_random_histories_take_no_other_step(watched: Database) -> None:
    """Claims, finishes of each kind, releases, cancels, lapses, time, changes of the pool; the same in each run."""
    dice = random.Random(1)
    lively = {"max_units": 6, "lease_secs": 20, "max_queue_depth": 8, "overflow": "drop_lowest", "run_timeout_secs": 30}
    retries = {"max_attempts": 2, "max_losses": 2, "backoff_secs": 5}
    watched.pool(**lively, retry=retries)
    tasks: list[int] = []
    for _ in range(600):
        what = dice.choice(
            ["submit", "submit", "submit", "claim", "finish", "finish", "release", "cancel", "time", "pool"]
        )
        live = watched.rows(
            "select task_id, attempt, state from pgpark.task order by state = 'parked', task_id limit 6"
        )
        task, attempt = ((r := dice.choice(live))["task_id"], r["attempt"]) if live else (0, 1)
        if what == "submit":
            later = dice.choice([None, None, 10])
            row = watched.submit(
                units=dice.randint(1, 4),
                priority=dice.choice(["low", "normal", "high"]),
                run_at=later and watched.after(later),
                deadline=dice.choice([None, watched.after(30)]),
            )
            tasks += [row["task_id"]] if row["accepted"] else []
        elif what == "claim":
            watched.claim(max_tasks=2)
        elif what == "finish":
            watched.finish(task, attempt, dice.choice(["completed", "failed", "dropped"]))
        elif what == "release":
            watched.rows("select pgpark.park_release(%s, %s)", task, attempt)
        elif what == "cancel":
            watched.rows("select pgpark.park_cancel(%s)", task)
        elif what == "time":
            watched.advance(dice.choice([1, 5, 25]))
            watched.maintain()
        else:
            watched.pool(
                **lively | {"max_units": dice.choice([3, 6, 6])}, retry=retries | {"max_attempts": dice.choice([1, 2])}
            )
    watched.lose(*tasks)
    watched.rows("select pgpark.park_drop_pool('gpu', true)")
    seen = _steps(watched)
    assert seen <= _table(), f"not in the picture: {seen - _table()}"
    assert len(seen) >= len(_table()) - 2, f"these histories are too tame: never {_table() - seen}"
