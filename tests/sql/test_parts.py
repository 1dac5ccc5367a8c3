"""park_emit, park_emit_many, park_parts: what a task tells before it ends, and how long that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Background, Database

Run = Callable[[Database, Callable[[], Any]], Background]
Open = Callable[[], Database]


def emit(db: Database, task: int, *contents: Any, attempt: int = 1, first: int | None = None) -> bool:
    """Emits partial results; a mapping with `kind` is a whole part."""
    parts = [one if isinstance(one, dict) and "kind" in one else {"content": one} for one in contents]
    return bool(db.value("select pgpark.park_emit(%s, %s, %s, %s)", task, attempt, Jsonb(parts), first))


def progress(value: Any) -> dict[str, Any]:
    return {"kind": "progress", "content": value}


def parts(db: Database, task: int, after: int = 0, max_parts: int = 1000) -> list[tuple[int, int, str, Any]]:
    rows = db.rows("select * from pgpark.park_parts(%s, %s, %s)", task, after, max_parts)
    return [(row["number"], row["attempt"], row["kind"], row["content"]) for row in rows]


def contents(db: Database, task: int) -> list[Any]:
    return [content for *_, content in parts(db, task)]


def kept(db: Database) -> int:
    return int(db.value("select count(*) from pgpark.part"))


def running(db: Database, **arguments: Any) -> int:
    task = db.parked(**arguments)
    assert db.claimed() == [task]
    return task


def ack(db: Database, task: int) -> int:
    return int(
        db.value("select pgpark.park_ack(array(select message_id from pgpark.park_result(%s)))", task),
    )


def refused(db: Database, statement: str, *parameters: Any) -> str:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        db.rows(statement, *parameters)
    return str(caught.value.diag.message_primary)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_parts_are_read_in_order_while_the_task_runs_and_after_it_has_ended(db: Database) -> None:
    db.pool()
    task = running(db)
    assert emit(db, task, "a", None)
    assert emit(db, task, {"x": [1]})
    told = [(1, 1, "partial", "a"), (2, 1, "partial", None), (3, 1, "partial", {"x": [1]})]
    assert parts(db, task) == told
    assert parts(db, task, after=1, max_parts=1) == told[1:2]
    db.finish(task)
    assert parts(db, task) == told


def test_an_unknown_task_has_no_parts(db: Database) -> None:
    assert parts(db, 999) == []


def test_the_number_of_rows_must_be_at_least_one(db: Database) -> None:
    assert refused(db, "select from pgpark.park_parts(1, 0, 0)") == "max_parts must be at least 1, not 0"
    assert refused(db, "select from pgpark.park_parts(1, 0, null)") == "max_parts must be at least 1, not NULL"


def test_only_the_last_progress_is_kept(db: Database) -> None:
    db.pool()
    task = running(db)
    emit(db, task, progress(0.1), "a", progress(0.2), "b")
    assert parts(db, task) == [(2, 1, "partial", "a"), (3, 1, "progress", 0.2), (4, 1, "partial", "b")]
    emit(db, task, progress(0.3), progress(0.4))
    assert parts(db, task) == [(2, 1, "partial", "a"), (4, 1, "partial", "b"), (6, 1, "progress", 0.4)]
    emit(db, task, "c")
    assert parts(db, task, after=4) == [(6, 1, "progress", 0.4), (7, 1, "partial", "c")]


def test_each_call_notifies_the_channel_of_its_task_once(db: Database, connect: Open) -> None:
    db.pool()
    task = running(db)
    reader = connect()
    reader.connection.execute(f'listen "pgpark.task.{task}"')
    emit(db, task, "a", "b", "c")
    (notice,) = reader.connection.notifies(timeout=10, stop_after=1)
    assert notice.payload == "3"
    emit(db, task)
    assert list(reader.connection.notifies(timeout=0.1)) == [], "there is nothing to read"


# -- the fence -------------------------------------------------------------------------------------------------------


def test_only_the_current_attempt_of_a_running_task_emits(db: Database) -> None:
    db.pool()
    task = db.parked()
    assert not emit(db, task, "parked", attempt=0)
    db.claim()
    assert emit(db, task, "first")
    assert not emit(db, task, "not yet", attempt=2)
    db.value("select pgpark.park_release(%s, 1)", task)
    assert not emit(db, task, "released")
    db.claim()
    assert not emit(db, task, "late")
    assert contents(db, task) == ["first"]
    db.finish(task, attempt=2)
    assert not emit(db, task, "ended", attempt=2)
    assert not emit(db, 999, "unknown")


def test_a_task_that_is_being_cancelled_may_still_emit(db: Database) -> None:
    db.pool()
    task = running(db)
    db.value("select pgpark.park_cancel(%s)", task)
    assert emit(db, task, "half an answer")
    db.finish(task, status="failed")
    assert (db.outcome(task), contents(db, task)) == (("dropped", "cancelled"), ["half an answer"])


def test_a_new_attempt_replaces_the_parts_of_the_one_before_when_it_emits(db: Database) -> None:
    db.pool()
    task = running(db)
    emit(db, task, "a", "b", progress(0.5))
    db.value("select pgpark.park_release(%s, 1)", task)
    db.claim()
    assert contents(db, task) == ["a", "b", 0.5], "until the next attempt emits"
    emit(db, task, "c", attempt=2)
    assert parts(db, task) == [(4, 2, "partial", "c")], "and the numbers go on rising"


def test_a_task_that_ends_with_an_attempt_that_told_nothing_keeps_no_parts(db: Database) -> None:
    db.pool()
    task = running(db)
    emit(db, task, "a")
    db.value("select pgpark.park_release(%s, 1)", task)
    db.claim()
    db.finish(task, attempt=2)
    assert kept(db) == 0
    assert db.value("select emitted from pgpark.mailbox") == 0


def test_a_repeated_call_adds_what_is_not_there_yet(db: Database) -> None:
    db.pool()
    task = running(db)
    assert emit(db, task, "a", progress(1), "b", first=1)
    assert emit(db, task, "a", progress(1), "b", first=1)
    assert contents(db, task) == ["a", 1, "b"]
    assert emit(db, task, "b", "c", first=3)
    assert contents(db, task) == ["a", 1, "b", "c"]
    db.value("select pgpark.park_release(%s, 1)", task)
    db.claim()
    assert emit(db, task, "new", first=1, attempt=2)
    assert contents(db, task) == ["new"]


def test_emitting_renews_the_lease_as_a_heartbeat_does(db: Database) -> None:
    """A heartbeat passes over a row that an emit holds, so emitting must not cost the lease."""
    db.pool(lease_secs=30, run_timeout_secs=100)
    db.freeze()
    task = running(db)

    def lease() -> float:
        return float(db.value("select extract(epoch from lease_until - pgpark._now()) from pgpark.task"))

    db.advance(5)
    emit(db, task, "a")
    assert lease() == 30, "written anyway, as it is the first"
    db.advance(9)
    emit(db, task, "b")
    assert lease() == 21, "no need yet"
    db.advance(9)
    emit(db, task, "c")
    assert lease() == 30
    db.advance(28)
    emit(db, task, "d")
    db.advance(29)
    emit(db, task, "e")
    db.advance(29)
    emit(db, task, "f")
    assert lease() == 1, "it is past its run_timeout"
    db.value("select pgpark.park_cancel(%s)", task)
    emit(db, task, "g")
    assert lease() == 30, "what is being cancelled holds its units while its worker is there"


# -- bounds and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "parts must be a JSON array, not object"),
        (None, "parts must be a JSON array, not null"),
        ([5], "element 1: a part is an object with content"),
        ([{"content": 1}, {"kind": "partial"}], "element 2: a part is an object with content"),
        ([{"content": 1, "kid": 1}], "element 1: unknown key 'kid'; a part has kind, content"),
        ([{"content": 1, "kind": "token"}], 'element 1: unknown kind "token"; use partial or progress'),
        ([{"content": 1, "kind": None}], "element 1: unknown kind null; use partial or progress"),
        ([{"content": "x" * 2**20}], "element 1: content is too large: 1048578 bytes as JSON, at most 1048576"),
    ],
)
def test_a_bad_part_is_named_and_nothing_is_emitted(db: Database, given: Any, message: str) -> None:
    db.pool()
    task = running(db)
    assert refused(db, "select pgpark.park_emit(%s, 1, %s)", task, Jsonb(given)) == message
    assert kept(db) == 0


def test_first_counts_from_one(db: Database) -> None:
    assert refused(db, "select pgpark.park_emit(1, 1, '[]', first => 0)") == "first must be at least 1, not 0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "emissions must be a JSON array, not object"),
        ([5], "element 1: an emission is an object with task_id, attempt and"),
        (
            [{"task_id": 1, "attempt": "x", "parts": []}],
            "element 1: an emission is an object with task_id, attempt and",
        ),
        (
            [{"task_id": 1, "attempt": 1, "parts": [], "first": "a"}],
            "element 1: an emission is an object with task_id, attempt and",
        ),
        ([{"task_id": 1, "attempt": 1}], "element 1: parts must be a JSON array, not NULL"),
        ([{"task_id": 1, "attempt": 1, "part": []}], "element 1: unknown key 'part'; an emission has task_id, attempt"),
        (
            [{"task_id": 1, "attempt": 1, "parts": []}, {"task_id": 1, "attempt": 1, "parts": [{"content": 1}, 7]}],
            "element 2: part 2: a part is an object with content",
        ),
    ],
)
def test_a_bad_emission_is_named_and_nothing_is_emitted(db: Database, given: Any, message: str) -> None:
    assert refused(db, "select from pgpark.park_emit_many(%s)", Jsonb(given)).startswith(message)


def test_many_tasks_emit_in_one_call_and_are_answered_in_order(db: Database) -> None:
    db.pool()
    one, two = db.parked(), db.parked()
    db.claim()
    emissions = [
        {"task_id": two, "attempt": 1, "parts": [{"content": "b"}], "first": 1},
        {"task_id": one, "attempt": 7, "parts": [{"content": "late"}]},
        {"task_id": one, "attempt": 1, "parts": [{"content": "a"}]},
        {"task_id": two, "attempt": 1, "parts": [{"content": "c"}], "first": 2},
    ]
    rows = db.rows("select * from pgpark.park_emit_many(%s)", Jsonb(emissions))
    assert [(row["task_id"], row["accepted"]) for row in rows] == [(two, True), (one, False), (one, True), (two, True)]
    assert (contents(db, one), contents(db, two)) == (["a"], ["b", "c"])


def test_an_attempt_emits_at_most_64_mib(db: Database) -> None:
    db.pool()
    task = running(db)
    large = "x" * (2**20 - 102)  # with its quotes and the overhead of a part, 1 MiB
    for _ in range(8):
        assert emit(db, task, *[large] * 8)
    assert emit(db, task, progress(large)), "progress does not pile up, so it does not count"
    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="has emitted more than 67108864 bytes"):
        emit(db, task, "")
    assert kept(db) == 65
    db.value("select pgpark.park_release(%s, 1)", task)
    db.claim()
    assert emit(db, task, "a new attempt has its own", attempt=2)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_another_isolation_level_is_refused(db: Database, level: str) -> None:
    db.connection.execute(f"begin transaction isolation level {level}")
    with pytest.raises(psycopg.errors.ActiveSqlTransaction):
        db.rows("select pgpark.park_emit(1, 1, '[]')")
    db.connection.execute("rollback")


# -- how long parts are kept -----------------------------------------------------------------------------------------


def finish(db: Database, task: int) -> None:
    assert db.finish(task)


def cancel_while_running(db: Database, task: int) -> None:
    db.value("select pgpark.park_cancel(%s)", task)
    db.finish(task, status="failed")


def cancel_while_parked(db: Database, task: int) -> None:
    db.value("select pgpark.park_release(%s, 1)", task)
    db.value("select pgpark.park_cancel(%s)", task)


def expire(db: Database, task: int) -> None:
    db.value("select pgpark.park_release(%s, 1)", task)
    db.advance(3600)
    assert db.maintain()["expired"] == 1


def fail(db: Database, task: int) -> None:
    db.finish(task, status="failed")


def lose_the_worker(db: Database, _task: int) -> None:
    db.advance(60)
    assert db.maintain()["reclaimed"] == 1


def lose_the_payload(db: Database, task: int) -> None:
    db.value("select pgpark.park_release(%s, 1)", task)
    db.connection.execute("delete from pgmq.q_gpu")
    assert db.claim() == []


def drop_the_pool(db: Database, _task: int) -> None:
    db.rows("select pgpark.park_drop_pool('gpu', force => true)")


ENDINGS = [
    finish,
    cancel_while_running,
    cancel_while_parked,
    expire,
    fail,
    lose_the_worker,
    lose_the_payload,
    drop_the_pool,
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("leaving", ["ack", "purge"])
def test_no_part_outlives_its_task_and_its_message(
    db: Database, ending: Callable[[Database, int], None], leaving: str
) -> None:
    db.pool(mailbox={"ttl_secs": 10_000}, retry={"max_losses": 1})
    db.freeze()
    task = running(db, deadline=db.after(1800))
    emit(db, task, "a", progress(1))
    ending(db, task)
    assert db.rows("select from pgpark.park_result(%s)", task)
    assert contents(db, task) == ["a", 1]
    if leaving == "ack":
        assert ack(db, task) == 1
    else:
        db.advance(20_000)
        assert db.maintain()["purged"] == 1
    assert kept(db) == 0


def test_acknowledging_one_task_leaves_the_parts_of_another(db: Database) -> None:
    db.pool()
    one, two = db.parked(), db.parked()
    db.claim()
    emit(db, one, "a")
    emit(db, two, "b")
    db.finish(one), db.finish(two)
    ack(db, one)
    assert (contents(db, one), contents(db, two)) == ([], ["b"])


def test_parts_that_lost_their_message_some_other_way_are_found_in_time(db: Database) -> None:
    db.pool()
    lost, ended, live = db.parked(), db.parked(), db.parked()
    db.claim()
    for task in (lost, ended, live):
        emit(db, task, "a")
    db.finish(lost), db.finish(ended)
    db.connection.execute("delete from pgpark.mailbox where task_id = %s", [lost])
    db.maintain()
    assert [contents(db, task) for task in (lost, ended, live)] == [[], ["a"], ["a"]]


# -- what it costs ---------------------------------------------------------------------------------------------------


def done_to(db: Database, table: str, work: Callable[[], None]) -> dict[str, int]:
    """What some work does to a table: scans, and rows read by index and updated. Rolled back."""

    def counters() -> dict[str, int]:
        (row,) = db.rows(
            "select seq_scan, coalesce(idx_scan, 0) as idx_scan, coalesce(idx_tup_fetch, 0) as idx_tup_fetch, n_tup_upd"
            " from pg_stat_xact_user_tables where schemaname = 'pgpark' and relname = %s",
            table,
        )
        return row

    db.connection.execute("begin")
    before = counters()
    work()
    after = counters()
    db.connection.execute("rollback")
    return {name: after[name] - before[name] for name in before}


def test_the_path_of_a_task_without_parts_touches_no_parts(db: Database) -> None:
    db.pool(retry={"max_attempts": 2, "backoff_secs": 0})
    other = db.parked()
    db.claim()
    emit(db, other, *range(100))

    def whole_path() -> None:
        task = db.parked()
        db.claim()
        db.finish(task, status="failed")
        db.rows("select pgpark._promote(p, pgpark._now(), 10) from pgpark.pool p")
        db.claim()
        db.finish(task, attempt=2, status="failed")
        assert ack(db, task) == 1

    for _ in range(7):
        whole_path()
    assert set(done_to(db, "part", whole_path).values()) == {0}


def test_emitting_reads_parts_by_index_only_and_does_not_rewrite_the_task(db: Database) -> None:
    db.pool()
    task = running(db)
    for number in range(7):
        emit(db, task, number)
    emit(db, task, *range(20_000))

    def talk() -> None:
        for number in range(10):
            emit(db, task, number, progress(number))
        parts(db, task, after=20_000)

    on_parts, on_tasks = done_to(db, "part", talk), done_to(db, "task", talk)
    assert (on_parts["seq_scan"], on_tasks["seq_scan"]) == (0, 0)
    assert on_parts["idx_tup_fetch"] < 100
    assert on_tasks["n_tup_upd"] == 0, "a lock leaves nothing behind that claims have to walk past"


# -- races -----------------------------------------------------------------------------------------------------------


def test_an_emit_against_the_finish_of_its_task(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = running(db)
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task)
    waiting = background(other, lambda: emit(other, task, "late")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False
    assert kept(db) == 0


def test_a_finish_against_an_emit_of_its_task(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = running(db)
    other = connect()
    db.connection.execute("begin")
    assert emit(db, task, "a")
    waiting = background(other, lambda: other.finish(task)).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is True
    assert contents(db, task) == ["a"]
    assert ack(db, task) == 1
    assert kept(db) == 0


def test_two_emits_of_one_attempt_take_numbers_after_each_other(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = running(db)
    emit(db, task, "before")
    other = connect()
    db.connection.execute("begin")
    emit(db, task, "a", progress(1))
    waiting = background(other, lambda: emit(other, task, "b", progress(2))).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is True
    assert [(number, content) for number, _, _, content in parts(db, task)] == [
        (1, "before"),
        (2, "a"),
        (4, "b"),
        (5, 2),
    ]


def test_an_emit_of_a_lapsed_attempt_against_the_new_one(db: Database, connect: Open, background: Run) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = running(db)
    emit(db, task, "old")
    db.advance(11)
    old = connect()
    db.connection.execute("begin")
    assert [row["attempt"] for row in db.claim(worker="new")] == [2]
    assert emit(db, task, "new", attempt=2)
    waiting = background(old, lambda: emit(old, task, "older still")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False
    assert contents(db, task) == ["new"]


def test_a_lapsed_lease_is_not_taken_back_under_an_emit(db: Database, connect: Open) -> None:
    """The emit is first: it holds the row and renews the lease, so the claim passes over the task."""
    db.pool(lease_secs=10)
    db.freeze()
    task = running(db)
    db.advance(11)
    other = connect()
    db.connection.execute("begin")
    assert emit(db, task, "alive")
    assert other.claim(worker="other") == []
    db.connection.execute("commit")
    assert other.claim(worker="other") == []
    assert db.status(task)["status"] == "running"


def test_a_claim_and_a_heartbeat_do_not_wait_for_an_open_emit(db: Database, connect: Open) -> None:
    db.pool()
    task = running(db)
    waiting = db.parked()
    other = connect()
    db.connection.execute("begin")
    emit(db, task, "a")
    assert other.claimed() == [waiting]
    assert other.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [task]) == []
    db.connection.execute("commit")


def test_a_cancel_waits_for_an_open_emit(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = running(db)
    other = connect()
    db.connection.execute("begin")
    emit(db, task, "a")
    cancelling = background(other, lambda: other.value("select pgpark.park_cancel(%s)", task)).wait_until_blocked()
    db.connection.execute("commit")
    assert cancelling.result() == "cancelling"


def test_batches_that_emit_and_finish_in_opposite_order_do_not_deadlock(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    one, two = db.parked(), db.parked()
    db.claim()
    blocker, other = connect(), connect()
    blocker.connection.execute("begin")
    blocker.rows("select from pgpark.task where task_id = %s for update", one)
    outcomes = [{"task_id": task, "attempt": 1} for task in (two, one)]
    finishing = background(
        other, lambda: other.rows("select from pgpark.park_finish_many(%s)", Jsonb(outcomes))
    ).wait_until_blocked()
    emissions = [{"task_id": task, "attempt": 1, "parts": [{"content": 1}]} for task in (two, one)]
    emitting = background(
        db, lambda: db.rows("select from pgpark.park_emit_many(%s)", Jsonb(emissions))
    ).wait_until_blocked()
    blocker.connection.execute("commit")  # the finish gets the first, and must not find the second taken
    assert len(emitting.result()) == len(finishing.result()) == 2
    assert kept(db) == 0
