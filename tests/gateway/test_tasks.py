"""Tasks over HTTP: submit, look, cancel."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from psycopg.conninfo import make_conninfo

from pgpark.gateway import mailbox
from tests.conftest import Database
from tests.gateway.conftest import Gateway


def test_a_task_is_submitted_and_looked_at(db: Database, admin: httpx.Client) -> None:
    db.pool()
    answer = admin.post("/pools/gpu/tasks", json={"payload": {"n": 1}, "units": 8, "priority": "high", "tenant": "a"})
    assert answer.status_code == 202
    told = answer.json()
    assert told == {"task_id": told["task_id"], "accepted": True, "status": "parked", "reason": None, "position": 0}
    status = admin.get(answer.headers["Location"])
    assert (status.status_code, status.json()["units"], status.json()["priority"]) == (200, 8, "high")


def test_the_position_counts_those_ahead(db: Database, admin: httpx.Client) -> None:
    db.pool()
    positions = [admin.post("/pools/gpu/tasks", json={"payload": 1}).json()["position"] for _ in range(3)]
    assert positions == [0, 1, 2]


def test_a_full_pool_says_when_to_come_back(db: Database, admin: httpx.Client) -> None:
    db.pool(max_queue_depth=1)
    assert admin.post("/pools/gpu/tasks", json={"payload": 1}).status_code == 202
    answer = admin.post("/pools/gpu/tasks", json={"payload": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_request_without_a_token_learns_nothing(db: Database, admin: httpx.Client) -> None:
    db.pool()
    answer = httpx.get(f"{admin.base_url}/pools")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_is_open_needs_no_token(admin: httpx.Client) -> None:
    for path in ("/health", "/ready", "/openapi.json"):
        assert httpx.get(f"{admin.base_url}{path}").status_code == 200
    for path in ("/health", "/ready"):
        answer = httpx.head(f"{admin.base_url}{path}")
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_trace_of_a_request_goes_with_its_tasks(db: Database, admin: httpx.Client) -> None:
    db.pool()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"traceparent": parent, "tracestate": "a=b"}
    first = admin.post("/pools/gpu/tasks", json={"payload": 1}, headers=headers).json()["task_id"]
    batch = {"tasks": [{"payload": 2}]}
    second = admin.post("/pools/gpu/tasks:batch", json=batch, headers=headers).json()["tasks"][0]["task_id"]
    odd = {"traceparent": "'; no trace at all"}
    third = admin.post("/pools/gpu/tasks", json={"payload": 3}, headers=odd).json()["task_id"]
    without = admin.post("/pools/gpu/tasks", json={"payload": 4}).json()["task_id"]
    rows = db.rows("select * from pgpark.park_traces(%s) order by 1", [first, second, third, without])
    assert rows == [{"task_id": task, "traceparent": parent, "tracestate": "a=b"} for task in (first, second)]


def test_a_key_makes_a_second_request_the_first(db: Database, admin: httpx.Client) -> None:
    db.pool()
    body = {"payload": 1, "tenant": "a"}
    first, second = (
        admin.post("/pools/gpu/tasks", json=body, headers={"Idempotency-Key": "order-1"}) for _ in range(2)
    )
    assert (second.status_code, second.json()["reason"]) == (202, "duplicate")
    assert second.json()["task_id"] == first.json()["task_id"]
    tasks = {"tasks": [body, body | {"idempotency_key": "own"}]}
    for _ in range(2):
        rows = admin.post("/pools/gpu/tasks:batch", json=tasks, headers={"Idempotency-Key": "b"}).json()["tasks"]
    assert [row["reason"] for row in rows] == ["duplicate", "duplicate"]
    assert db.stats()["parked"] == 3
    answer = admin.post("/pools/gpu/tasks", json=body | {"idempotency_key": "y"}, headers={"Idempotency-Key": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "different_keys")


def test_a_key_that_is_null_is_none(db: Database, admin: httpx.Client) -> None:
    """Programs that send every field send null for those that they do not use."""
    db.pool()
    body = {"payload": 1, "tenant": "a", "idempotency_key": None}
    for path, sent in (("tasks", body), ("tasks:batch", {"tasks": [body]})):
        for _ in range(2):
            answer = admin.post(f"/pools/gpu/{path}", json=sent, headers={"Idempotency-Key": "k"})
            assert answer.status_code == 202, answer.text
    assert db.stats()["parked"] == 2
    assert admin.post("/pools/gpu/tasks", json=body).json()["reason"] is None


def test_a_parameter_that_is_not_there_is_refused_and_says_what_is(db: Database, admin: httpx.Client) -> None:
    db.pool()
    answer = admin.get("/mailbox/t", params={"limt": 5})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "code": "bad_request",
        "message": "there is no parameter 'limt' here",
        "hint": "There are: user, session, since, limit.",
    }
    assert admin.post("/pools/gpu/tasks?dry_run=1", json={"payload": 1}).json()["error"]["hint"] == "There are none."
    assert db.stats()["parked"] == 0
    assert httpx.get(admin.base_url.join("/?utm_source=a")).status_code == 200


def test_a_batch_tells_of_each_what_became_of_it(db: Database, admin: httpx.Client) -> None:
    db.pool()
    tasks = [{"payload": 1}, {"payload": 2, "units": 25}, {"payload": 3, "run_at": "2999-01-01T00:00:00+23:00"}]
    answer = admin.post("/pools/gpu/tasks:batch", json={"tasks": tasks})
    rows = [(row["status"], row["reason"]) for row in answer.json()["tasks"]]
    assert (answer.status_code, rows) == (202, [("parked", None), ("rejected", "too_large"), ("delayed", None)])
    bad = {"tasks": [{"payload": 1}, {"payload": "\u0000"}]}
    assert admin.post("/pools/gpu/tasks:batch", json=bad).status_code == 400
    assert db.stats()["parked"] == 1


def test_a_task_is_cancelled(db: Database, admin: httpx.Client) -> None:
    db.pool()
    running, parked = db.parked(), db.parked(tenant="a")
    db.claim(max_tasks=1)
    answer = admin.delete(f"/pools/gpu/tasks/{parked}", params={"reason": "not needed"})
    assert answer.json() == {"task_id": parked, "status": "dropped"}
    assert db.outcome(parked) == ("dropped", "not needed")
    assert admin.delete(f"/pools/gpu/tasks/{running}").json()["status"] == "cancelling"
    beat = admin.post("/pools/gpu/heartbeat", json={"worker": "w", "task_ids": [running]})
    assert beat.json() == {"stop": [running]}
    assert admin.delete(f"/pools/gpu/tasks/{parked}").json()["status"] == "finished"


def test_a_mailbox_is_read_in_part_and_emptied(db: Database, admin: httpx.Client) -> None:
    db.pool()
    for user in ("u", "v"):
        task = db.parked(tenant="a bü", user_id=user, session_id="s")
        db.claim()
        db.finish(task, result=user)
    path = "/mailbox/a%20b%C3%BC"
    messages = admin.get(path, params={"since": "2001-01-01T00:00:00Z"}).json()["messages"]
    assert [message["payload"] for message in messages] == ["u", "v"]
    assert [m["user_id"] for m in admin.get(path, params={"user": "v", "session": "s"}).json()["messages"]] == ["v"]
    assert len(admin.get(path, params={"limit": 1}).json()["messages"]) == 1
    assert admin.get(path, params={"since": "2999-01-01T00:00:00Z"}).json() == {"messages": []}
    ids = [message["message_id"] for message in messages]
    assert admin.post(f"{path}/ack", json={"message_ids": [*ids, 999]}).json() == {"acknowledged": 2}
    assert admin.get(path).json() == {"messages": []}


def test_a_mailbox_with_large_messages_is_read_in_several_answers(
    db: Database, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "_MOST_BYTES", 2000)
    db.pool()
    tasks = [db.parked(tenant="a") for _ in range(4)]
    db.claim()
    for task, size in zip(tasks, (5000, 800, 800, 800), strict=True):
        db.finish(task, result="x" * size)
    answers = []
    while messages := admin.get("/mailbox/a").json()["messages"]:
        answers.append([message["task_id"] for message in messages])
        admin.post("/mailbox/a/ack", json={"message_ids": [message["message_id"] for message in messages]})
    assert answers == [tasks[:1], tasks[1:3], tasks[3:]]


def test_settings_are_changed_one_by_one(db: Database, admin: httpx.Client) -> None:
    db.pool(max_bypass=4, retry={"max_attempts": 3, "backoff_secs": 2})
    changes = {"max_units": 48, "retry": {"max_attempts": 5}, "max_bypass": None}
    assert admin.patch("/pools/gpu", json=changes).json() == {"result": "changed"}
    assert admin.patch("/pools/gpu", json=changes).json() == {"result": "unchanged"}
    pool = admin.get("/pools/gpu").json()["pool"]
    assert pool["config"] == {"max_units": 48, "retry": {"max_attempts": 5, "backoff_secs": 2}}
    for wrong in ({"max_unit": 1}, {"max_units": 0}, {"max_units": None}):
        answer = admin.patch("/pools/gpu", json=wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    assert admin.patch("/pools/nowhere", json=changes).status_code == 404
    assert admin.post("/pools/gpu/state", json={"state": "paused"}).json() == {"state": "paused"}
    assert admin.get("/pools/gpu").json()["stats"]["state"] == "paused"


def test_a_gateway_whose_role_may_little_lets_its_tokens_do_no_more(
    db: Database, gateways: Callable[..., Gateway], role: str
) -> None:
    db.pool()
    for kind in ("producer", "worker"):
        db.rows("select pgpark.park_grant(%s, %s)", role, kind)
    gateway = gateways(dsn=make_conninfo(db.dsn, options=f"-c role={role}"))
    admin = gateway.client("admin")
    assert admin.get("/ready").status_code == 200
    task = admin.post("/pools/gpu/tasks", json={"payload": 1, "tenant": "a"}).json()["task_id"]
    assert admin.post("/pools/gpu/claims", json={"worker": "w"}).json()["tasks"][0]["task_id"] == task
    outcomes = {"outcomes": [{"task_id": task, "attempt": 1}]}
    assert admin.post("/pools/gpu/finish", json=outcomes).json()["outcomes"][0]["accepted"]
    assert admin.get(f"/pools/gpu/tasks/{task}/result", params={"wait": 5}).status_code == 200
    answer = admin.patch("/pools/gpu", json={"max_units": 5})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert gateway.client("producer", tenants=["b"]).get(f"/pools/gpu/tasks/{task}").status_code == 404


def test_a_refusal_does_not_spoil_the_connection_for_those_who_come_after(
    db: Database, gateways: Callable[..., Gateway]
) -> None:
    """What is prepared in a transaction that has failed already is not."""
    db.pool()
    client = gateways(max_connections=1).client()
    for pool in (["gpu"] * 5 + ["nowhere"]) * 2 + ["gpu"]:
        assert client.get(f"/pools/{pool}").status_code == (200 if pool == "gpu" else 404)
