"""What somebody tries over HTTP beyond what the token is for, and what is sent that is no request."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Callable

import httpx
import pytest

from pgpark.gateway.guard import OPEN
from tests.conftest import Database, wait_for
from tests.gateway.conftest import Gateway


def code(answer: httpx.Response) -> tuple[int, str]:
    problem = answer.json()["error"]
    assert problem.keys() == {"code", "message", "hint"}
    assert "\n" not in problem["message"]
    return answer.status_code, problem["code"]


@pytest.fixture
def rival(db: Database) -> list[int]:
    """Tasks of the tenant `rival`: ended, running, parked."""
    db.pool()
    tasks = [db.parked(tenant="rival", payload="of the rival") for _ in range(3)]
    db.claim(max_tasks=2)
    db.finish(tasks[0], result="a secret")
    return tasks


def test_another_tenants_tasks_are_not_there(db: Database, gateway: Gateway, rival: list[int]) -> None:
    client = gateway.client("producer", tenants=["a"])
    for task in (*rival, 987654321):
        for path in ("", "/result", "/result?wait=5", "/events"):
            answer = client.get(f"/pools/gpu/tasks/{task}{path}")
            assert code(answer) == (404, "unknown_task")
            assert answer.json()["error"]["message"] == f"there is no task {task} here"
        assert code(client.delete(f"/pools/gpu/tasks/{task}")) == (404, "unknown_task")
    assert [db.status(task)["status"] for task in rival] == ["completed", "running", "parked"]


def test_another_tenants_mailbox_is_closed(db: Database, gateway: Gateway, rival: list[int]) -> None:
    client = gateway.client("producer", tenants=["a"])
    message = db.value("select message_id from pgpark.mailbox")
    assert code(client.get("/mailbox/rival")) == (403, "forbidden")
    assert code(client.get("/mailbox/rival/events")) == (403, "forbidden")
    assert code(client.post("/mailbox/rival/ack", json={"message_ids": [message]})) == (403, "forbidden")
    assert client.post("/mailbox/a/ack", json={"message_ids": [message]}).json() == {"acknowledged": 0}
    assert db.outcome(rival[0]) == ("completed", None)
    answer = client.post("/pools/gpu/tasks", json={"payload": 1, "tenant": "rival"})
    assert code(answer) == (403, "forbidden")
    assert "a secret" not in answer.text
    assert code(client.post("/pools/gpu/tasks", json={"payload": 1})) == (403, "forbidden")
    mixed = {"tasks": [{"payload": 1, "tenant": "a"}, {"payload": 1, "tenant": "rival"}]}
    assert code(client.post("/pools/gpu/tasks:batch", json=mixed)) == (403, "forbidden")


def test_an_idempotency_key_of_another_tenant_gives_a_task_of_ones_own(db: Database, gateway: Gateway) -> None:
    db.pool()
    foreign = db.parked(tenant="rival", idempotency_key="k")
    client = gateway.client("producer", tenants=["a"])
    answer = client.post("/pools/gpu/tasks", json={"payload": 1, "tenant": "a"}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["reason"]) == (202, None)
    assert answer.json()["task_id"] != foreign


def test_each_kind_is_kept_to_its_routes(gateway: Gateway, rival: list[int]) -> None:
    producer, worker, reader = (gateway.client(kind) for kind in ("producer", "worker", "reader"))
    task = {"task_id": rival[1], "attempt": 1}
    tries = {
        "submit": lambda client: client.post("/pools/gpu/tasks", json={"payload": 1}),
        "look": lambda client: client.get(f"/pools/gpu/tasks/{rival[0]}/result"),
        "claim": lambda client: client.post("/pools/gpu/claims", json={"worker": "w2", "max_units": 1}),
        "pause": lambda client: client.post("/pools/gpu/state", json={"state": "active"}),
        "resize": lambda client: client.patch("/pools/gpu", json={"max_units": 24}),
        "numbers": lambda client: client.get("/pools"),
    }
    allowed = {what: [try_(client).is_success for client in (producer, worker, reader)] for what, try_ in tries.items()}
    assert allowed == {
        "submit": [True, False, False],
        "look": [True, False, False],
        "claim": [False, True, False],
        "pause": [False, False, False],
        "resize": [False, False, False],
        "numbers": [True, True, True],
    }
    # A fenced finish is no error, and changes nothing.
    finished = producer.post("/pools/gpu/finish", json={"outcomes": [task]})
    assert finished.json() == {"outcomes": [{"task_id": rival[1], "accepted": False}]}


def test_another_pools_tasks_are_fenced(db: Database, gateway: Gateway, rival: list[int]) -> None:
    db.pool("cpu")
    worker = gateway.client("worker", pools=["cpu"])
    held = {"task_id": rival[1], "attempt": 1}
    assert code(worker.post("/pools/gpu/claims", json={"worker": "w"})) == (403, "forbidden")
    assert code(worker.post("/pools/gpu/finish", json={"outcomes": [held]})) == (403, "forbidden")
    fenced = {"outcomes": [{"task_id": rival[1], "accepted": False}]}
    assert worker.post("/pools/cpu/finish", json={"outcomes": [held]}).json() == fenced
    assert worker.post("/pools/cpu/release", json={"tasks": [held]}).json() == fenced
    parts = {"emissions": [{**held, "parts": [{"content": 1}]}]}
    assert worker.post("/pools/cpu/parts", json=parts).json() == fenced
    beat = worker.post("/pools/cpu/heartbeat", json={"worker": "w", "task_ids": [rival[1]]})
    assert beat.json() == {"stop": [rival[1]]}
    assert db.status(rival[1])["status"] == "running"


def test_a_task_is_not_found_in_another_pool(db: Database, admin: httpx.Client) -> None:
    db.pool("gpu")
    db.pool("cpu")
    task = db.parked("gpu")
    for method, path in (("GET", ""), ("GET", "/result"), ("GET", "/events"), ("DELETE", "")):
        assert code(admin.request(method, f"/pools/cpu/tasks/{task}{path}")) == (404, "unknown_task")


def test_whoever_has_no_good_token_learns_nothing(gateway: Gateway) -> None:
    schema = httpx.get(f"{gateway.url}/openapi.json").json()
    wrong = ["", "Bearer", "Basic abc", "Bearer x", "Bearer " + "x" * 5000, "bearer park_" + "A" * 43, "Bearer pärk",
             "Bearer a b", "Bearer ' or 1=1 --"]  # fmt: skip
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        for path, methods in [*schema["paths"].items(), ("/nowhere", {"get": {}})]:
            if path in OPEN:
                continue
            for method in methods:
                url = path.replace("{pool}", "gpu").replace("{tenant}", "a").replace("{task_id}", "1")
                assert code(client.request(method, url, content=b"{")) == (401, "unauthorized"), (method, path)
        for header in wrong:
            answer = client.get("/pools", headers={"Authorization": header.encode()})
            assert code(answer) == (401, "unauthorized"), header


def test_two_tokens_are_none(gateway: Gateway) -> None:
    secret = gateway.secret()
    headers = [("Authorization", f"Bearer {secret}"), ("Authorization", f"Bearer {secret}")]
    assert code(httpx.get(f"{gateway.url}/pools", headers=headers)) == (401, "unauthorized")


def test_a_token_in_the_address_is_none(gateway: Gateway) -> None:
    secret = gateway.secret()
    answer = httpx.get(f"{gateway.url}/pools", params={"token": secret, "access_token": secret})
    assert code(answer) == (401, "unauthorized")


def test_what_is_revoked_is_refused_at_once(db: Database, gateway: Gateway) -> None:
    client = gateway.client(name="t")
    assert client.get("/pools").status_code == 200
    db.rows("select pgpark.park_revoke_token('t')")
    assert code(client.get("/pools")) == (401, "unauthorized")


BAD_TASKS = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"payload": "\xff"}', b'{"payload": NaN}', b'{"payload": 1e400}',
    b'{"payload": "\\u0000"}', b'{"payload": "\\ud800"}', b'{"payload": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"payload": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}", b'{"payload": ' + b"9" * 5000 + b"}",
    b'{"payload": 1, "units": 0}', b'{"payload": 1, "units": 1e30}', b'{"payload": 1, "units": true}',
    b'{"payload": 1, "units": "5"}', b'{"payload": 1, "deadline": 5}', b'{"payload": 1, "deadline": "5"}',
    b'{"payload": 1, "priority": "urgent"}', b'{"payload": 1, "deadline": "soon"}', b'{"payload": 1, "x": 1}',
    b'{"payload": 1, "tenant": 5}', b'{"payload": 1, "run_at": "9999-12-31T23:59:59Z"}', b'{"units": 1}',
    b'{"payload": 1, "prompt_tokens": 5}', b'{"payload": 1, "deadline": "0001-01-01T00:00:00+05:00"}',
    b'{"payload": 1, "tenant": "' + b"x" * 300 + b'"}',
]  # fmt: skip


def test_what_is_no_task_is_told_so_in_a_line(db: Database, admin: httpx.Client) -> None:
    db.pool()
    for body in BAD_TASKS:
        answer = admin.post("/pools/gpu/tasks", content=body, headers={"Content-Type": "application/json"})
        assert code(answer) == (400, "bad_request"), body[:100]
        assert len(answer.json()["error"]["message"]) < 1200
    assert db.value("select count(*) from pgpark.task") == 0


def test_a_body_that_is_not_read_as_json_is_told_what_would_be(db: Database, admin: httpx.Client) -> None:
    db.pool()
    json = "application/json"
    wrong: list[tuple[bytes, dict[str, str], str]] = [
        (b'{"payload": 1}', {}, "Content-Type: application/json"),
        (b'{"payload": 1}', {"Content-Type": "application/x-www-form-urlencoded"}, "Content-Type: application/json"),
        (gzip.compress(b'{"payload": 1}'), {"Content-Type": json, "Content-Encoding": "gzip"}, "not compressed"),
        (b'{"payload": "\xe4"}', {"Content-Type": f"{json}; charset=latin-1"}, "UTF-8"),
        (b'{"payload": NaN}', {"Content-Type": json}, "NaN"),
        (b'{"payload": "\\u0000"}', {"Content-Type": json}, "u0000"),
        (b'{"payload": "\\ud800"}', {"Content-Type": json}, "surrogate"),
    ]
    for body, headers, hint in wrong:
        answer = admin.post("/pools/gpu/tasks", content=body, headers=headers)
        assert code(answer) == (400, "bad_request")
        assert hint in answer.json()["error"]["hint"], answer.text


def test_what_is_said_twice_is_taken_not_even_once(db: Database, admin: httpx.Client) -> None:
    db.pool()
    answer = admin.get("/mailbox/a?user=u&limit=1&user=v")
    assert code(answer) == (400, "bad_request")
    assert admin.get("/mailbox/a?user=u&limit=1").status_code == 200
    for name in ("Idempotency-Key", "Last-Event-ID"):
        headers = [("Content-Type", "application/json"), (name, "a"), (name, "b")]
        answer = admin.post("/pools/gpu/tasks", content=b'{"payload": 1}', headers=headers)
        assert code(answer) == (400, "bad_request")
        assert name in answer.json()["error"]["message"]


def test_deep_json_that_postgres_takes_goes_through(db: Database, admin: httpx.Client) -> None:
    db.pool()
    deep = b"[" * 500 + b"]" * 500
    answer = admin.post(
        "/pools/gpu/tasks", content=b'{"payload": ' + deep + b"}", headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 202
    claimed = admin.post("/pools/gpu/claims", json={"worker": "w"})
    assert deep in claimed.content


def test_numbers_lose_no_digits_on_the_way_out(db: Database, admin: httpx.Client) -> None:
    db.pool()
    db.rows("select from pgpark.park_submit('gpu', '{\"n\": 12345678901234567890.123456789}')")
    assert "12345678901234567890.123456789" in admin.post("/pools/gpu/claims", json={"worker": "w"}).text


BAD_ADDRESSES = [
    "/pools/GPU/tasks/1", "/pools/a%2Fb", "/pools/gpu%00", "/pools/gpu/tasks/0", "/pools/gpu/tasks/-1",
    "/pools/gpu/tasks/x",
    "/pools/gpu/tasks/99999999999999999999", "/mailbox/a?limit=0", "/mailbox/a?limit=x", "/mailbox/a?since=soon",
    "/mailbox/a%00", "/mailbox/" + "a" * 300, "/pools/gpu/tasks/1/result?wait=nan", "/pools/gpu/tasks/1/result?wait=-1",
    "/mailbox/a?user=%00", "/pools/../../etc/passwd", "//pools", "/pools/",
]  # fmt: skip


def test_a_bad_address_is_told_so(admin: httpx.Client) -> None:
    for path in BAD_ADDRESSES:
        answer = admin.send(httpx.Request("GET", str(admin.base_url).rstrip("/") + path, headers=admin.headers))
        assert code(answer) in {(400, "bad_request"), (404, "not_found")}, path


def test_a_wrong_method_is_told_which_are_right(admin: httpx.Client) -> None:
    for method, path in (
        ("PUT", "/pools"),
        ("DELETE", "/pools/gpu"),
        ("GET", "/pools/gpu/claims"),
        ("TRACE", "/pools"),
    ):
        answer = admin.request(method, path)
        assert code(answer) == (405, "method_not_allowed")
        assert answer.headers["Allow"]


def test_a_large_body_is_refused_however_it_is_sent(gateways: Callable[..., Gateway], db: Database) -> None:
    db.pool()
    gateway = gateways(max_body_bytes=10_000)
    client = gateway.client()
    body = b'{"payload": "' + b"x" * 20_000 + b'"}'
    json = {"Content-Type": "application/json"}
    assert code(client.post("/pools/gpu/tasks", content=body, headers=json)) == (413, "body_too_large")
    pieces = (body[start : start + 1000] for start in range(0, len(body), 1000))
    assert code(client.post("/pools/gpu/tasks", content=pieces, headers=json)) == (413, "body_too_large")
    small = (piece for piece in (b'{"payload":', b" 1}"))
    assert client.post("/pools/gpu/tasks", content=small, headers=json).status_code == 202


def test_a_body_without_end_is_cut_off(gateways: Callable[..., Gateway], db: Database) -> None:
    db.pool()
    gateway = gateways(max_body_bytes=10_000)
    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"POST /pools/gpu/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.secret()}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        for _ in range(12):
            connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert b" 413 " in connection.recv(100)


def test_a_payload_that_is_too_large_for_the_pool_is_413(db: Database, admin: httpx.Client) -> None:
    db.pool(max_payload_kb=1)
    answer = admin.post("/pools/gpu/tasks", json={"payload": "x" * 2000})
    assert code(answer) == (413, "payload_too_large")


def test_a_refusal_is_a_conflict(db: Database, admin: httpx.Client) -> None:
    db.pool(max_queue_depth=1)
    db.parked()
    refused_ = {"too_large": {"units": 25}, "deadline_expired": {"deadline": "2001-01-01T00:00:00Z"}, "queue_full": {}}
    for expected, task in refused_.items():
        body = {"payload": 1} | task
        assert code(admin.post("/pools/gpu/tasks", json=body)) == (409, expected)
        assert code(admin.post("/pools/gpu/tasks:batch", json={"tasks": [body, body]})) == (409, expected)


def test_a_closed_pool_is_a_conflict_that_may_pass(db: Database, admin: httpx.Client) -> None:
    db.pool()
    assert admin.post("/pools/gpu/state", json={"state": "draining"}).json() == {"state": "draining"}
    answer = admin.post("/pools/gpu/tasks", json={"payload": 1})
    assert code(answer) == (409, "pool_closed")
    assert int(answer.headers["Retry-After"]) > 0


def test_the_limit_of_a_token_holds_for_all_gateways_together(gateways: Callable[..., Gateway]) -> None:
    gateway, other = gateways(), gateways()
    secret = gateway.secret("reader", requests_per_sec=0.001, burst=4)
    clients = [gateway.client(secret=secret), other.client(secret=secret)]
    statuses = [clients[turn % 2].get("/pools").status_code for turn in range(6)]
    assert statuses == [200] * 4 + [429] * 2
    answer = clients[0].get("/pools")
    assert code(answer) == (429, "too_many_requests")
    assert 900 < int(answer.headers["Retry-After"]) <= 1000
    assert gateway.client().get("/pools").status_code == 200


def test_pages_elsewhere_may_not_call_unless_they_are_named(gateways: Callable[..., Gateway]) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    closed, opened = gateways(), gateways(cors_origins=("https://app.example",))
    answer = httpx.options(f"{closed.url}/pools", headers=asked)
    assert "access-control-allow-origin" not in answer.headers
    answer = httpx.options(f"{opened.url}/pools", headers=asked | {"Access-Control-Request-Headers": "authorization"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    # An error can be read, too.
    answer = httpx.get(f"{opened.url}/pools", headers={"Origin": "https://app.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "https://app.example")
    answer = httpx.get(f"{opened.url}/pools", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_forged_notification_changes_nothing(db: Database, gateway: Gateway) -> None:
    db.pool()
    client = gateway.client()
    task = db.parked(tenant="a")
    wait_for(lambda: gateway.app.state.hub._listening)
    with client.stream("GET", f"/pools/gpu/tasks/{task}/events?max_secs=3") as stream:
        for payload in ("", "x", "9" * 30, "-1", str(task), "\u0661"):
            db.rows("select pg_notify('pgpark.mailbox', %s)", payload)
        db.rows("select pg_notify(%s, 'x')", f"pgpark.task.{task}")
        db.rows("select pg_notify('pgpark.pool.gpu', 'x')")
        db.claim()
        db.finish(task)
        assert "event: outcome" in stream.read().decode()
