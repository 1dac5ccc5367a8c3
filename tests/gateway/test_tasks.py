"""Tasks over HTTP: submit, look, cancel."""

from __future__ import annotations

import httpx

from tests.conftest import Database


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
