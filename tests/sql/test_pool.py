"""park_put_pool and its neighbours: settings, live changes, states, dropping."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database


def settings_of(db: Database, pool: str = "gpu") -> Any:
    return db.value("select settings from pgpark.park_pools(%s)", pool)


def test_only_max_units_is_required_and_the_rest_has_defaults(db: Database) -> None:
    assert db.pool(max_units=24) == "created"
    assert settings_of(db) == {
        "max_units": 24,
        "max_queue_depth": None,
        "default_timeout_secs": None,
        "resource_kind": None,
        "max_bypass": 0,
        "overflow": "reject",
        "fairness": "fifo",
        "tenants": {},
        "lease_secs": 30,
        "run_timeout_secs": None,
        "scheduling_slack_secs": 0,
        "retry": {"max_attempts": 1, "max_losses": 3, "backoff_secs": 1, "backoff_factor": 2, "max_backoff_secs": 300},
        "archive": False,
        "max_payload_kb": None,
        "audit": False,
        "audit_days": None,
        "mailbox": {
            "ttl_secs": None,
            "storage": {"type": "postgres", "table": "mailbox_messages"},
            "notifier": None,
        },
        "cost_model": None,
        "queue": {"type": "postgres_pgmq", "queue_name": "gpu"},
    }


def test_every_setting_of_the_config_is_kept(db: Database) -> None:
    config = {
        "max_units": 20,
        "max_queue_depth": 10000,
        "default_timeout_secs": 60,
        "resource_kind": "gpu_vram",
        "max_bypass": 3,
        "overflow": "drop_lowest",
        "fairness": "tenant",
        "tenants": {"acme": {"weight": 2.5, "max_units": None}, "a.b": {"weight": 1, "max_units": 4}},
        "lease_secs": 10,
        "run_timeout_secs": 600,
        "scheduling_slack_secs": 0.5,
        "retry": {"max_attempts": 4, "max_losses": 5, "backoff_secs": 2, "backoff_factor": 3, "max_backoff_secs": 99},
        "archive": True,
        "max_payload_kb": 512,
        "audit": True,
        "audit_days": 365,
        "mailbox": {
            "ttl_secs": 86400,
            "storage": {"type": "postgres", "table": "answers"},
            "notifier": {
                "type": "http",
                "base_url": "https://example.com/hooks",
                "auth_header": None,
                "timeout_secs": 3.5,
                "max_attempts": 7,
            },
        },
        "cost_model": {"model_vram_gb": 4.7, "kv_per_token_mb": 0.125, "max_batch_tokens": 8192},
        "queue": {"type": "postgres_pgmq", "queue_name": "llm"},
    }
    db.pool(**config)
    assert settings_of(db) == config
    assert db.value("select config from pgpark.park_pools('gpu')") == config


def test_putting_the_same_config_again_changes_nothing(db: Database) -> None:
    assert [db.pool(max_units=5), db.pool(max_units=5), db.pool(max_units=6)] == ["created", "unchanged", "changed"]


def test_a_changed_pool_keeps_its_state(db: Database) -> None:
    db.pool()
    db.rows("select pgpark.park_set_pool_state('gpu', 'paused')")
    db.pool(max_units=30)
    assert db.stats()["state"] == "paused"


def test_a_grown_pool_starts_more_and_says_so(db: Database, connect: Any) -> None:
    db.pool(max_units=8)
    db.parked(units=8)
    waiting = db.parked(units=8)
    db.claim()
    listener = connect()
    listener.connection.execute('listen "pgpark.pool.gpu"')
    db.pool(max_units=16)
    assert [notice.channel for notice in listener.connection.notifies(timeout=5, stop_after=1)] == ["pgpark.pool.gpu"]
    assert db.claimed() == [waiting]


def test_a_shrunk_pool_starts_nothing_until_it_fits_again(db: Database) -> None:
    db.pool(max_units=20)
    first, second = db.parked(units=10), db.parked(units=10)
    db.claim()
    small = db.parked(units=1)
    db.pool(max_units=10)
    assert db.claimed() == []
    db.finish(first)
    assert db.claimed() == []
    db.finish(second)
    assert db.claimed() == [small]


def test_a_shrink_drops_the_waiting_tasks_that_can_never_fit(db: Database) -> None:
    db.pool(max_units=20)
    large, delayed, small = db.parked(units=11), db.parked(units=11, run_at=db.after(100)), db.parked(units=10)
    db.pool(max_units=10)
    assert db.outcome(large) == db.outcome(delayed) == ("dropped", "too_large")
    assert db.claimed() == [small]


def test_a_task_that_comes_back_to_a_shrunk_pool_does_not_block_it(db: Database) -> None:
    db.pool(max_units=20)
    large = db.parked(units=20)
    db.claim()
    db.pool(max_units=10)
    small = db.parked(units=5)
    db.value("select pgpark.park_release(%s, 1)", large)
    assert db.claimed() == [small]
    assert db.outcome(large) == ("dropped", "too_large")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "pools.gpu.max_units is missing"),
        ({"max_units": None}, "pools.gpu.max_units is missing"),
        ({"max_units": 0}, "pools.gpu.max_units must be a whole number from 1 to 1000000000, not 0"),
        ({"max_units": 1.5}, "pools.gpu.max_units must be a whole number from 1 to 1000000000, not 1.5"),
        ({"max_units": "24"}, 'pools.gpu.max_units must be a whole number from 1 to 1000000000, not "24"'),
        ({"max_units": 1e12}, "pools.gpu.max_units must be a whole number"),
        (
            {"max_units": 1, "max_unit": 2},
            "pools.gpu.max_unit is no key of a pool (did you mean max_units?); here belong: max_units, ",
        ),
        ({"max_units": 1, "retry": {"attempts": 2}}, "pools.gpu.retry.attempts is no key of a pool; here belong: "),
        ({"max_units": 1, "retry": 5}, "pools.gpu.retry must be an object, not 5"),
        ({"max_units": 1, "lease_secs": 0}, "pools.gpu.lease_secs must be a number from 0.1 to 1000000000, not 0"),
        ({"max_units": 1, "archive": "yes"}, 'pools.gpu.archive must be true or false, not "yes"'),
        ({"max_units": 1, "resource_kind": "tpu"}, "pools.gpu.resource_kind must be one of cpu, gpu_vram, io, mixed"),
        ({"max_units": 1, "fairness": "fair"}, 'pools.gpu.fairness must be one of fifo, tenant, not "fair"'),
        ({"max_units": 1, "overflow": "drop"}, 'pools.gpu.overflow must be one of reject, drop_lowest, not "drop"'),
        ({"max_units": 1, "tenants": ["a"]}, "pools.gpu.tenants must be an object, not an array"),
        ({"max_units": 1, "tenants": {"a": 2}}, "pools.gpu.tenants.a must be an object, not 2"),
        ({"max_units": 1, "tenants": {"a": {"weight": 0}}}, "pools.gpu.tenants.a.weight must be a number from 0.001"),
        ({"max_units": 1, "tenants": {"a": {"max_units": 0}}}, "pools.gpu.tenants.a.max_units must be a whole number"),
        (
            {"max_units": 1, "tenants": {"a.b": {"wieght": 2}}},
            "pools.gpu.tenants.a.b.wieght is no key of a pool (did you mean weight?); here belong: weight, max_units",
        ),
        (
            {"max_units": 1, "tenants": {"é" * 128: {}}},
            f"pools.gpu.tenants.{'é' * 128} is too long a name; a tenant takes at most 255 bytes",
        ),
        ({"max_units": 1, "queue": {"type": "kafka"}}, "pools.gpu.queue.type must be one of in_memory, postgres_"),
        (
            {"max_units": 1, "queue": {"table": "t"}},
            "pools.gpu.queue.table goes with the type postgres_custom, not with",
        ),
        (
            {"max_units": 1, "queue": {"type": "yaque", "queue_name": "q"}},
            "pools.gpu.queue.queue_name goes with the type in_memory or postgres_pgmq, not with yaque",
        ),
        (
            {"max_units": 1, "queue": {"type": "postgres_custom", "table": "No"}},
            "pools.gpu.queue.table must be a table name (1 to 63 lower-case letters, digits and _, no digit first)",
        ),
        (
            {"max_units": 1, "mailbox": {"storage": {"type": "in_memory", "table": "t"}}},
            "pools.gpu.mailbox.storage.table goes with the type postgres, not with in_memory",
        ),
        ({"max_units": 1, "mailbox": [{"auth_header": "x"}]}, "pools.gpu.mailbox must be an object, not an array"),
        ({"max_units": 1, "mailbox": "hidden"}, "pools.gpu.mailbox must be an object, not a string"),
        ({"max_units": 1, "mailbox": {"notifier": {}}}, "pools.gpu.mailbox.notifier.base_url is missing"),
        (
            {"max_units": 1, "mailbox": {"notifier": {"base_url": "https://user:hidden@example.com"}}},
            "pools.gpu.mailbox.notifier.base_url must be a URL such as https://gateway.example.com/hooks, without",
        ),
        (
            {"max_units": 1, "mailbox": {"notifier": {"base_url": "http://a", "auth_header": "a\nb"}}},
            "pools.gpu.mailbox.notifier.auth_header must be the text of an HTTP header, in ASCII and on one line",
        ),
        (
            {"max_units": 1, "queue": {"queue_name": "No Good"}},
            "pools.gpu.queue.queue_name must be a name that pgmq can take (1 to 47 lower-case letters, digits and _), "
            'not "No Good"',
        ),
        ({"max_units": 1, "queue": {"queue_name": "x" * 48}}, "pools.gpu.queue.queue_name must be a name that pgmq"),
        ({"max_units": 1, "cost_model": {}}, "pools.gpu.cost_model needs model_vram_gb, kv_per_token_mb and"),
        (
            {"max_units": 1, "cost_model": dict.fromkeys(("model_vram_gb", "kv_per_token_mb", "max_batch_tokens"))},
            "pools.gpu.cost_model needs model_vram_gb, kv_per_token_mb and",
        ),
        ({"max_units": 1, "retry.max_attempts": 5}, "pools.gpu.retry.max_attempts is no key of a pool"),
        ([], "pools.gpu: the config must be a JSON object, not array"),
        (None, "pools.gpu: the config must be a JSON object, not null"),
    ],
)
def test_a_wrong_config_is_named_by_its_path_and_nothing_is_done(db: Database, config: Any, message: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        db.rows("select pgpark.park_put_pool('gpu', %s)", Jsonb(config))
    assert str(caught.value.diag.message_primary).startswith(message)
    assert db.rows("select * from pgpark.park_pools()") == []


@pytest.mark.parametrize("name", ["", "GPU", "a b", "a-b", "x" * 41, "ü", "a\n", 'a"b'])
def test_an_impossible_pool_name_is_refused(db: Database, name: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"(?s)pool name .* is not possible"):
        db.pool(name)


def test_the_longest_names_work(db: Database) -> None:
    db.pool("p" * 40, queue={"type": "postgres_pgmq", "queue_name": "q" * 47}, archive=True)
    task = db.parked("p" * 40)
    assert db.claimed("p" * 40) == [task]
    assert db.finish(task)


def test_a_queue_of_somebody_else_is_not_taken_over(db: Database) -> None:
    db.rows("select pgmq.create('mine')")
    with pytest.raises(psycopg.errors.DuplicateObject, match="there is a pgmq queue 'mine' already"):
        db.pool("mine")
    assert db.pool("mine", queue={"type": "postgres_pgmq", "queue_name": "mine2"}) == "created"


def test_two_pools_cannot_share_a_queue(db: Database) -> None:
    db.pool("a")
    with pytest.raises(psycopg.errors.DuplicateObject):
        db.pool("b", queue={"type": "postgres_pgmq", "queue_name": "a"})


@pytest.mark.parametrize("state", ["on", "", None])
def test_an_unknown_state_is_named(db: Database, state: str | None) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"unknown state .*; use active, paused, draining"):
        db.rows("select pgpark.park_set_pool_state('gpu', %s)", state)


def test_a_pool_with_live_tasks_is_dropped_only_by_force(db: Database) -> None:
    db.pool()
    parked, running = db.parked(units=24, priority="low"), db.parked(units=24)
    db.claim()
    with pytest.raises(psycopg.errors.ObjectInUse, match="pool 'gpu' still has 2 live tasks"):
        db.rows("select pgpark.park_drop_pool('gpu')")
    db.rows("select pgpark.park_drop_pool('gpu', force => true)")
    assert db.outcome(parked) == db.outcome(running) == ("dropped", "pool_dropped")
    assert not db.finish(running)
    assert db.value("select to_regclass('pgmq.q_gpu')") is None
    assert db.pool() == "created"


@pytest.mark.parametrize(
    "call",
    [
        "park_drop_pool('nope')",
        "park_set_pool_state('nope', 'paused')",
        "park_claim('nope', 'w')",
        "park_heartbeat('nope', 'w', '{}')",
        "park_prune('nope')",
        "park_maintain('nope')",
        "park_explain('nope')",
        "park_stats('nope')",
        "park_metrics('nope')",
        "park_history('nope')",
        "park_demand('nope')",
        "park_pools('nope')",
        "park_llm_units('nope', 1, 1)",
        "park_submit_many('nope', '[]')",
    ],
)
def test_every_function_names_an_unknown_pool(db: Database, call: str) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject, match="unknown pool 'nope'"):
        db.rows(f"select * from pgpark.{call}")


def test_a_number_too_small_to_hold_is_named(db: Database) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"scheduling_slack_secs must be a number from 0"):
        db.rows("select pgpark.park_put_pool('gpu', '{\"max_units\": 1, \"scheduling_slack_secs\": 1e-400}')")
