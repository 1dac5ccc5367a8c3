"""Callbacks: the outbox, deliveries under a lease, backoff, dead letters, and the secret that nothing shows."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database

SECRET = "Bearer s3cr3t-T0ken"


def notified(db: Database, name: str = "gpu", /, **notifier: Any) -> str:
    """Makes a pool with a notifier."""
    return db.pool(name, mailbox={"notifier": {"base_url": "https://example.com", "auth_header": SECRET} | notifier})


def ended(db: Database, pool: str = "gpu", /, **arguments: Any) -> int:
    """A task that was cancelled before it started, with an outcome."""
    task = db.parked(pool, **{"tenant": "t"} | arguments)
    db.value("select pgpark.park_cancel(%s)", task)
    return task


def taken(db: Database, max_callbacks: int = 10, pool: str | None = None) -> list[Any]:
    return db.rows("select * from pgpark.park_callbacks(%s, %s)", max_callbacks, pool)


def done(db: Database, callback: Any, status: int | None = None, error: str | None = None, **arguments: Any) -> str:
    """Reports an attempt."""
    given = {"attempt": callback["attempt"], "retry_after_secs": None} | arguments
    return str(
        db.value(
            "select pgpark.park_callback_done(%s, %s, %s, %s, %s)",
            callback["callback_id"],
            given["attempt"],
            status,
            error,
            given["retry_after_secs"],
        )
    )


def outbox(db: Database) -> int:
    return int(db.value("select count(*) from pgmq.q_pgpark_outbox"))


def letters(db: Database, pool: str | None = None) -> list[Any]:
    return db.rows("select * from pgpark.park_dead_letters(%s)", pool)


def due_in(db: Database) -> float:
    """Seconds until the only callback is due."""
    return float(db.value("select extract(epoch from due - pgpark._now())::float8 from pgpark.park_callbacks_due()"))


# -- into the outbox -------------------------------------------------------------------------------------------------


def test_a_callback_is_a_copy_of_the_mailbox_row(db: Database) -> None:
    notified(db, timeout_secs=4)
    db.parked(tenant="acme", user_id="ann", session_id="s1")
    (task,) = db.claim()
    db.finish(task["task_id"], result={"answer": [1, None, "é"], "big": 12345678901234567890123})
    (message,) = db.rows("select * from pgpark.park_fetch('acme')")
    db.value("select pgpark.park_ack(%s)", [message["message_id"]])
    (callback,) = taken(db)
    assert {name: callback[name] for name in ("task_id", "pool", "attempt", "url", "auth_header", "timeout_secs")} == {
        "task_id": task["task_id"],
        "pool": "gpu",
        "attempt": 1,
        "url": "https://example.com/mailbox/acme/ann/s1",
        "auth_header": SECRET,
        "timeout_secs": 4,
    }
    assert callback["body"].pop("created_at").endswith("+00:00")
    assert callback["body"] == {name: value for name, value in message.items() if name != "created_at"}


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "dropped"])
def test_every_outcome_is_called_back(db: Database, status: str) -> None:
    db.freeze()
    notified(db)
    task = db.parked(tenant="t", deadline=db.after(10))
    if status == "expired":
        db.advance(11)
        db.maintain()
    elif status == "dropped":
        db.value("select pgpark.park_cancel(%s)", task)
    else:
        db.claim()
        db.finish(task, status=status)
    assert [callback["body"]["status"] for callback in taken(db)] == [status]


def test_a_task_without_a_tenant_and_a_pool_without_a_notifier_call_nobody(db: Database) -> None:
    notified(db)
    db.pool("silent")
    ended(db, tenant=None)
    ended(db, "silent")
    assert outbox(db) == 0


def test_an_outcome_that_is_rolled_back_calls_nobody(db: Database) -> None:
    notified(db)
    task = db.parked(tenant="t")
    db.claim()
    with db.connection.transaction(force_rollback=True):
        assert db.finish(task)
        assert outbox(db) == 1
    assert outbox(db) == 0
    assert db.finish(task)
    assert outbox(db) == 1


def test_a_batch_puts_all_its_callbacks_in_the_order_of_the_mailbox(db: Database) -> None:
    notified(db)
    tasks = [db.parked(tenant=f"t{n}") for n in range(5)]
    db.claim()
    db.rows("select pgpark.park_finish_many(%s)", Jsonb([{"task_id": task, "attempt": 1} for task in reversed(tasks)]))
    messages = [row["body"]["message_id"] for row in taken(db)]
    assert messages == sorted(messages)
    assert len(messages) == 5


def test_an_outcome_notifies_with_the_name_of_its_pool(db: Database, connect: Any) -> None:
    listener = connect()
    listener.connection.execute('listen "pgpark.callback"')
    notified(db)
    ended(db)
    (notice,) = listener.connection.notifies(timeout=5, stop_after=1)
    assert notice.payload == "gpu"


# -- where to --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "key", "path"),
    [
        ("https://h", ("acme", None, None), "https://h/mailbox/acme"),
        ("https://h/", ("acme", "ann", None), "https://h/mailbox/acme/ann"),
        ("https://h:8443/a/b//", ("acme", "ann", "s"), "https://h:8443/a/b/mailbox/acme/ann/s"),
        ("https://h", ("acme", None, "s"), "https://h/mailbox/acme"),
        ("https://h", ("a/b", "c?d#e", "f%2Fg"), "https://h/mailbox/a%2Fb/c%3Fd%23e/f%252Fg"),
        ("https://h", ("é ß", "日本", "😀"), "https://h/mailbox/%C3%A9%20%C3%9F/%E6%97%A5%E6%9C%AC/%F0%9F%98%80"),
        ("https://h", ("-._~aZ09", "a.b", "\n\\'\""), "https://h/mailbox/-._~aZ09/a.b/%0A%5C%27%22"),
        ("https://h", ("..", ".", "..."), "https://h/mailbox/%2E%2E/%2E/..."),
    ],
)
def test_a_url_has_each_part_percent_encoded(db: Database, base: str, key: Any, path: str) -> None:
    notified(db, base_url=base)
    ended(db, tenant=key[0], user_id=key[1], session_id=key[2])
    assert [callback["url"] for callback in taken(db)] == [path]


def test_a_corrected_url_and_secret_hold_for_what_waits(db: Database) -> None:
    notified(db)
    ended(db)
    assert notified(db, base_url="https://new/x", auth_header="Bearer other", timeout_secs=2) == "changed"
    (callback,) = taken(db)
    assert (callback["url"], callback["auth_header"], callback["timeout_secs"]) == (
        "https://new/x/mailbox/t",
        "Bearer other",
        2,
    )


# -- taking ----------------------------------------------------------------------------------------------------------


def test_a_callback_is_taken_once_until_its_lease_lapses(db: Database) -> None:
    db.freeze()
    notified(db, timeout_secs=60)
    ended(db)
    assert [callback["attempt"] for callback in taken(db)] == [1]
    db.advance(60)
    assert taken(db) == [], "whoever took it may still be at it"
    db.advance(11)
    assert [callback["attempt"] for callback in taken(db)] == [2]


def test_two_takers_at_once_share_what_is_due(db: Database, connect: Any) -> None:
    notified(db)
    for _ in range(4):
        ended(db)
    db.connection.execute("begin")
    mine = {callback["callback_id"] for callback in taken(db, 2)}
    others = {callback["callback_id"] for callback in taken(connect(), 10)}
    db.connection.execute("commit")
    assert (len(mine), len(others)) == (2, 2)
    assert not mine & others


def test_pools_take_turns_however_much_waits_in_one(db: Database) -> None:
    for name in ("a", "b", "c"):
        notified(db, name)
    for name in "aaaaaabc":
        ended(db, name)
    assert sorted(callback["pool"] for callback in taken(db, 4)) == ["a", "a", "b", "c"]
    assert [callback["pool"] for callback in taken(db, 2, "a")] == ["a", "a"]


def test_what_was_due_first_is_taken_first(db: Database) -> None:
    db.freeze()
    notified(db)
    first, second = ended(db), ended(db)
    (callback,) = taken(db, 1)
    assert (callback["task_id"], done(db, callback, 503, retry_after_secs=5)) == (first, "retry")
    db.advance(10)
    assert [callback["task_id"] for callback in taken(db, 1)] == [second]


def test_the_next_due_time_is_told_for_each_pool(db: Database) -> None:
    db.freeze()
    for name in ("a", "b", "c"):
        notified(db, name, timeout_secs=20)
    ended(db, "a"), ended(db, "b"), ended(db, "b")
    taken(db, pool="a"), taken(db, 1, pool="b")
    rows = db.rows("select pool, due - pgpark._now() as due from pgpark.park_callbacks_due()")
    assert [(row["pool"], row["due"].total_seconds()) for row in rows] == [("a", 30), ("b", 0)]


@pytest.mark.parametrize("call", ["park_callbacks(0)", "park_callbacks(null)", "park_dead_letters(max_letters => 0)"])
def test_an_impossible_number_is_named(db: Database, call: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"max_\w+ must be at least 1, not"):
        db.rows(f"select * from pgpark.{call}")


# -- reporting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "word"),
    [
        *((status, "delivered") for status in (200, 201, 204, 299)),
        *((status, "retry") for status in (None, 100, 301, 307, 408, 425, 429, 500, 503, 599)),
        *((status, "dead") for status in (400, 401, 403, 404, 410, 422, 499)),
    ],
)
def test_an_answer_decides_what_becomes_of_a_callback(db: Database, status: int | None, word: str) -> None:
    notified(db)
    ended(db)
    (callback,) = taken(db)
    assert done(db, callback, status) == word
    assert (outbox(db), len(letters(db))) == (int(word == "retry"), int(word == "dead"))


def test_the_pause_doubles_up_to_an_hour(db: Database) -> None:
    db.freeze()
    notified(db, max_attempts=100)
    ended(db)
    total = 0.0
    for attempt in range(1, 25):
        (callback,) = taken(db)
        assert callback["attempt"] == attempt
        assert done(db, callback, 500) == "retry"
        most = min(2 ** (attempt - 1), 3600)
        assert most * 0.75 <= due_in(db) <= most
        if attempt < 20:
            total += due_in(db)
        db.advance(due_in(db) + 0.001)
    assert total > 5 * 3600, "twenty attempts outlast an outage of hours"


def test_callbacks_that_failed_together_do_not_come_back_together(db: Database) -> None:
    notified(db)
    for _ in range(5):
        ended(db)
    for callback in taken(db):
        done(db, callback, 500)
    assert db.value("select count(distinct vt) from pgmq.q_pgpark_outbox") == 5


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [(None, 0.7, 1), (-5, 0.7, 1), (0, 0.7, 1), (7, 7, 7), (1e9, 86400, 86400), ("NaN", 86400, 86400)],
)
def test_a_receiver_may_ask_for_a_longer_pause(db: Database, asked: Any, least: float, most: float) -> None:
    db.freeze()
    notified(db)
    ended(db)
    (callback,) = taken(db)
    done(db, callback, 429, retry_after_secs=None if asked is None else float(asked))
    assert least <= due_in(db) <= most


def test_the_last_attempt_that_fails_makes_a_dead_letter(db: Database) -> None:
    db.freeze()
    notified(db, max_attempts=2)
    task = ended(db, tenant="acme", user_id="u")
    (callback,) = taken(db)
    assert done(db, callback, None, "connection refused") == "retry"
    db.advance(10)
    (callback,) = taken(db)
    assert done(db, callback, 503) == "dead"
    (letter,) = letters(db)
    assert letter.pop("created_at") <= letter["died_at"] == db.after(0)
    del letter["died_at"]
    assert letter == {
        "callback_id": callback["callback_id"],
        "task_id": task,
        "pool": "gpu",
        "tenant": "acme",
        "url": "https://example.com/mailbox/acme/u",
        "attempts": 2,
        "http_status": 503,
        "error": "HTTP 503",
    }


def test_attempts_that_nobody_reports_are_used_up_too(db: Database) -> None:
    db.freeze()
    notified(db, max_attempts=3, timeout_secs=5)
    ended(db)
    (callback,) = taken(db)
    done(db, callback, 500, "HTTP 500 Internal Server Error")
    for _ in range(2):
        db.advance(100)
        assert len(taken(db)) == 1
    db.advance(100)
    assert taken(db) == []
    (letter,) = letters(db)
    assert (letter["attempts"], letter["http_status"], letter["error"]) == (3, 500, "HTTP 500 Internal Server Error")


def test_a_late_failure_of_an_earlier_attempt_changes_nothing(db: Database) -> None:
    db.freeze()
    notified(db, timeout_secs=5)
    ended(db)
    (first,) = taken(db)
    db.advance(16)
    (second,) = taken(db)
    before = due_in(db)
    assert done(db, first, 500) == done(db, first, 410) == done(db, first, None) == "unknown"
    assert due_in(db) == before
    assert done(db, second, 500) == "retry"


def test_a_late_success_of_an_earlier_attempt_counts(db: Database) -> None:
    db.freeze()
    notified(db, timeout_secs=5)
    ended(db)
    (first,) = taken(db)
    db.advance(16)
    (second,) = taken(db)
    assert done(db, first, 200) == "delivered"
    assert done(db, second, 500) == "unknown"
    assert (outbox(db), letters(db)) == (0, [])


def test_a_success_after_the_callback_was_given_up_takes_the_letter_away(db: Database) -> None:
    notified(db)
    ended(db)
    (callback,) = taken(db)
    db.rows("select pgpark.park_drop_pool('gpu')")
    assert len(letters(db)) == 1
    assert done(db, callback, 200) == "delivered"
    assert letters(db) == []
    assert done(db, callback, 200) == "unknown"


def test_only_the_beginning_of_a_long_error_is_kept(db: Database) -> None:
    notified(db, max_attempts=1)
    ended(db)
    (callback,) = taken(db)
    done(db, callback, None, "x" * 10000)
    assert letters(db)[0]["error"] == "x" * 500


# -- dead letters ----------------------------------------------------------------------------------------------------


def dead(db: Database, pool: str = "gpu", /) -> int:
    """A dead letter; returns its callback_id."""
    ended(db, pool)
    (callback,) = taken(db, 1, pool)
    assert done(db, callback, 410) == "dead"
    return int(callback["callback_id"])


def retried(db: Database, ids: list[int] | None = None, pool: str | None = None) -> int:
    return int(db.value("select pgpark.park_retry_callbacks(%s, %s)", ids, pool))


def test_a_dead_letter_that_is_retried_has_all_its_attempts_again(db: Database) -> None:
    notified(db, max_attempts=2)
    first, second = dead(db), dead(db)
    assert retried(db, [first, 999999]) == 1
    assert [letter["callback_id"] for letter in letters(db)] == [second]
    (callback,) = taken(db)
    assert (callback["callback_id"], callback["attempt"], callback["body"]["tenant"]) == (first, 1, "t")
    assert done(db, callback, 500) == "retry"


def test_dead_letters_are_retried_by_pool_or_all(db: Database, connect: Any) -> None:
    for name in ("a", "b"):
        notified(db, name)
    for name in ("a", "a", "b", "b"):
        dead(db, name)
    assert len(letters(db, "a")) == 2
    listener = connect()
    listener.connection.execute('listen "pgpark.callback"')
    assert (retried(db, pool="a"), retried(db, [], "b"), retried(db), retried(db)) == (2, 0, 2, 0)
    assert {notice.payload for notice in listener.connection.notifies(timeout=5, stop_after=2)} == {"a", "b"}
    assert (outbox(db), letters(db)) == (4, [])


def test_letters_are_bounded_and_the_oldest_come_first(db: Database) -> None:
    notified(db)
    first, second, _ = dead(db), dead(db), dead(db)
    rows = db.rows("select callback_id from pgpark.park_dead_letters(max_letters => 2)")
    assert [row["callback_id"] for row in rows] == [first, second]


def test_what_waits_for_a_pool_that_is_dropped_becomes_dead_letters(db: Database) -> None:
    notified(db)
    ended(db)
    db.parked(tenant="t")
    db.rows("select pgpark.park_drop_pool('gpu', force => true)")
    assert [(letter["pool"], letter["error"], letter["attempts"]) for letter in letters(db)] == [
        ("gpu", "the pool was dropped", 0)
    ] * 2
    assert outbox(db) == 0
    assert db.value("select count(*) from pgpark.pool_secret") == 0
    notified(db, base_url="https://again")
    assert retried(db) == 2
    assert {callback["url"] for callback in taken(db)} == {"https://again/mailbox/t"}


def test_what_waits_for_a_notifier_that_is_taken_away_becomes_dead_letters(db: Database) -> None:
    notified(db)
    ended(db)
    assert db.pool() == "changed"
    assert [letter["error"] for letter in letters(db)] == ["the pool has no notifier any more"]
    assert retried(db) == 1
    assert taken(db) == []
    assert len(letters(db)) == 1, "there is still nowhere to deliver it to"


def test_an_outcome_that_lands_while_its_notifier_is_taken_away_is_not_lost(db: Database, connect: Any) -> None:
    notified(db)
    task = db.parked(tenant="t")
    db.claim()
    other = connect()
    other.connection.execute("begin")
    assert other.finish(task)
    db.pool()
    other.connection.execute("commit")
    assert (taken(db), [letter["task_id"] for letter in letters(db)]) == ([], [task])


# -- secrets ---------------------------------------------------------------------------------------------------------


def info(db: Database) -> Any:
    (row,) = db.rows("select config, settings from pgpark.park_pools('gpu')")
    return row


def put(db: Database, config: Any, name: str = "gpu") -> str:
    return str(db.value("select pgpark.park_put_pool(%s, %s)", name, Jsonb(config)))


def header(db: Database) -> Any:
    return db.value("select max(auth_header) from pgpark.pool_secret")


def test_settings_show_the_notifier_with_defaults_and_without_its_secret(db: Database) -> None:
    notified(db)
    assert info(db)["settings"]["mailbox"]["notifier"] == {
        "type": "http",
        "base_url": "https://example.com",
        "auth_header": "(secret)",
        "timeout_secs": 10,
        "max_attempts": 20,
    }


def test_a_config_that_was_shown_can_be_put_back(db: Database) -> None:
    notified(db)
    config = info(db)["config"]
    assert config["mailbox"]["notifier"]["auth_header"] == "(secret)"
    assert put(db, config) == "unchanged"
    assert put(db, config | {"max_units": 5}) == "changed"
    assert put(db, info(db)["settings"] | {"fairness": "tenant"}) == "changed"
    assert header(db) == SECRET


def test_only_a_changed_secret_counts_as_a_change(db: Database) -> None:
    assert [notified(db), notified(db), notified(db, auth_header="Bearer new")] == ["created", "unchanged", "changed"]
    assert header(db) == "Bearer new"
    assert notified(db, auth_header=None) == "changed"
    assert (header(db), info(db)["settings"]["mailbox"]["notifier"]["auth_header"]) == (None, None)


@pytest.mark.parametrize("made", [True, False])
def test_the_word_for_a_stored_secret_needs_one(db: Database, made: bool) -> None:
    if made:
        notified(db, auth_header=None)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"auth_header is \(secret\), which stands for"):
        notified(db, auth_header="(secret)")
    assert len(db.rows("select from pgpark.park_pools()")) == int(made)


def test_a_secret_goes_with_its_notifier(db: Database) -> None:
    notified(db)
    db.pool()
    assert (header(db), info(db)["settings"]["mailbox"]["notifier"]) == (None, None)


def test_the_dsn_of_a_pool_is_not_stored(db: Database) -> None:
    assert db.pool(database="postgresql://u:s3cr3t@h/db") == "created"
    assert db.pool(database="postgresql://u:other@h/db") == "unchanged"
    assert info(db)["config"] == {"max_units": 24}


@pytest.mark.parametrize(
    ("notifier", "message"),
    [
        (SECRET, "mailbox.notifier must be an object, not a string"),
        ([SECRET], "mailbox.notifier must be an object, not an array"),
        ({"auth_headr": SECRET}, "mailbox.notifier.auth_headr is no key of a pool (did you mean auth_header?)"),
        ({"auth_header": [SECRET]}, "mailbox.notifier.auth_header must be the text of an HTTP header"),
        ({"auth_header": SECRET + "\r\nX: y"}, "mailbox.notifier.auth_header must be the text of an HTTP header"),
        ({"auth_header": f" {SECRET}"}, "mailbox.notifier.auth_header must be the text of an HTTP header"),
        ({"auth_header": f"{SECRET}é"}, "mailbox.notifier.auth_header must be the text of an HTTP header"),
        ({"auth_header": ""}, "mailbox.notifier.auth_header must be the text of an HTTP header"),
        ({"auth_header": SECRET}, "mailbox.notifier.base_url is missing"),
        ({"base_url": f"https://u:{SECRET}@h"}, "mailbox.notifier.base_url must be a URL such as"),
        ({"base_url": f"https://h/?key={SECRET}"}, "mailbox.notifier.base_url must be a URL such as"),
        (
            {"timeout_secs": SECRET},
            "mailbox.notifier.timeout_secs must be a number from 0.1 to 1000000000, not a string",
        ),
        ({"timeout_secs": 0}, "mailbox.notifier.timeout_secs must be a number from 0.1 to 1000000000, not 0"),
        ({"type": SECRET}, "mailbox.notifier.type must be one of http, not a string"),
    ],
)
def test_a_wrong_notifier_is_named_without_repeating_secrets(db: Database, notifier: Any, message: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        put(db, {"max_units": 1, "mailbox": {"notifier": notifier}})
    diag = caught.value.diag
    said = json.dumps([diag.message_primary, diag.message_detail, diag.message_hint, diag.context, str(caught.value)])
    assert str(diag.message_primary).startswith(f"pools.gpu.{message}")
    assert "s3cr3t" not in said


def test_nothing_but_the_table_of_secrets_holds_a_secret(db: Database) -> None:
    db.freeze()
    notified(db, max_attempts=1)
    ended(db), dead(db)
    put(db, info(db)["config"] | {"max_units": 3})
    holders = []
    for (table,) in db.connection.cursor(row_factory=psycopg.rows.tuple_row).execute(
        "select oid::regclass::text from pg_class where relkind = 'r'"
        " and relnamespace in ('pgpark'::regnamespace, 'pgmq'::regnamespace)"
    ):
        if db.value(f"select exists (select from {table} t where t::text like '%%s3cr3t%%' and %s)", True):
            holders.append(table)
    assert holders == ["pgpark.pool_secret"]
    functions = ["park_pools()", "park_stats()", "park_dead_letters()", "park_callbacks_due()"]
    assert not [f for f in functions if "s3cr3t" in str(db.rows(f"select * from pgpark.{f}"))]


# -- plans -----------------------------------------------------------------------------------------------------------


def test_taking_costs_the_same_with_many_callbacks_in_backoff(db: Database) -> None:
    """Statements of park_callbacks and park_callbacks_due walk an index: what is not due is not read."""
    notified(db, "down")
    notified(db, "up")
    ended(db, "down"), ended(db, "up")
    db.connection.execute(
        "insert into pgmq.q_pgpark_outbox (vt, message)"
        " select clock_timestamp() + interval '1 hour', message from pgmq.q_pgpark_outbox, generate_series(1, 20000)"
        " where message ->> 'pool' = 'down'"
    )
    db.connection.execute("analyze pgmq.q_pgpark_outbox")
    with db.connection.transaction():
        assert len(taken(db)) == 2
        (row,) = db.rows(
            "select seq_scan, seq_tup_read, idx_tup_fetch from pg_stat_xact_user_tables"
            " where relname = 'q_pgpark_outbox'"
        )
    assert row["seq_tup_read"] == 0
    assert row["idx_tup_fetch"] < 100


def test_a_finish_that_calls_back_never_scans_the_mailbox(db: Database) -> None:
    """Plans are cached while the mailbox is small, and must hold when it has grown."""
    notified(db, max_attempts=1000)

    def finish() -> None:
        task = db.parked(tenant="t")
        db.claim()
        assert db.finish(task)

    for _ in range(3):
        finish()
    db.connection.execute(
        "insert into pgpark.mailbox (task_id, pool, tenant, status, priority, units, attempt, submitted_at, created_at,"
        " pool_id, storage) select 1000000 + n, 'gpu', 't', 'completed', 1, 1, 1, now(), now(), 1, 'mailbox_messages'"
        " from generate_series(1, 20000) n"
    )
    with db.connection.transaction():
        finish()
        scans = "select seq_scan from pg_stat_xact_user_tables where relname = 'mailbox_messages'"
        assert db.value(scans) == 0
    assert outbox(db) == 4
