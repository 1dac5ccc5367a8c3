"""Waiting over HTTP: results, event streams, claims; many at once, resumed, and on two gateways."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgpark.gateway.connections import Connections
from tests.conftest import Database, wait_for
from tests.gateway.conftest import Gateway


def events(client: httpx.Client, path: str, last: str | None = None, **params: Any) -> Iterator[tuple[str, Any, str]]:
    """The events of a stream: kind, data, id."""
    headers = {} if last is None else {"Last-Event-ID": last}
    with client.stream("GET", path, params={"max_secs": 20} | params, headers=headers) as stream:
        assert stream.status_code == 200, stream.read()
        found: dict[str, str] = {}
        for line in stream.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                found[name] = value
            elif "event" in found:
                yield found["event"], json.loads(found["data"]), found.get("id", "")
                found = {}


def watching(gateway: Gateway) -> int:
    return int(gateway.app.state.hub._count)


def emit(db: Database, task: int, *contents: Any) -> None:
    db.rows("select pgpark.park_emit(%s, 1, %s)", task, Jsonb([{"content": content} for content in contents]))


def test_a_task_is_followed_to_its_end(db: Database, gateway: Gateway) -> None:
    db.pool()
    task = db.parked(tenant="a")
    stream = events(gateway.client("producer", tenants=["a"]), f"/pools/gpu/tasks/{task}/events")
    kind, status, _ = next(stream)
    assert (kind, status["status"], status["position"]) == ("status", "parked", 0)
    db.claim()
    emit(db, task, "one", {"two": 2})
    assert [next(stream)[0] for _ in range(1)] == ["status"]
    assert [(kind, part["content"], id_) for kind, part, id_ in (next(stream), next(stream))] == [
        ("part", "one", "1"),
        ("part", {"two": 2}, "2"),
    ]
    db.finish(task, result="done")
    rest = list(stream)
    assert [(kind, message["payload"], id_) for kind, message, id_ in rest] == [("outcome", "done", "end")]


def test_a_stream_goes_on_where_it_was_cut(db: Database, admin: httpx.Client) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, *range(250))
    db.finish(task)
    path = f"/pools/gpu/tasks/{task}/events"
    found = list(events(admin, path, last="120"))
    assert [part["content"] for _, part, _ in found[:-1]] == list(range(120, 250))
    assert [kind for kind, _, _ in events(admin, path, last="250")] == ["outcome"]
    # Who has had the outcome is told not to come back.
    assert admin.get(path, headers={"Last-Event-ID": "end"}).status_code == 204


def test_a_full_mailbox_is_told_without_a_pause(db: Database, admin: httpx.Client) -> None:
    db.pool("gpu", max_units=1000)
    tasks = [db.parked(tenant="a") for _ in range(230)]
    db.claim(max_tasks=1000)
    db.rows("select from pgpark.park_finish_many(%s)", Jsonb([{"task_id": task, "attempt": 1} for task in tasks]))
    stream = events(admin, "/mailbox/a/events")
    assert [message["task_id"] for _, (_, message, _) in zip(tasks, stream, strict=False)] == tasks


def test_a_stream_goes_on_when_a_late_outcome_is_committed(
    db: Database, admin: httpx.Client, connect: Callable[[], Database]
) -> None:
    """It is another tenant's, so that nobody rings this mailbox."""
    db.pool("gpu", max_units=1000)
    late = db.parked(tenant="rival")
    tasks = [db.parked(tenant="a") for _ in range(230)]
    db.claim(max_tasks=1000)
    other = connect()
    other.connection.execute("begin")
    other.finish(late)
    db.rows("select from pgpark.park_finish_many(%s)", Jsonb([{"task_id": task, "attempt": 1} for task in tasks]))
    stream = events(admin, "/mailbox/a/events")
    assert [next(stream)[1]["task_id"] for _ in range(200)] == tasks[:200]
    other.connection.execute("commit")
    assert [next(stream)[1]["task_id"] for _ in range(30)] == tasks[200:]


def test_large_parts_are_read_as_they_are_taken(
    db: Database, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many clients that read slowly must not fill the memory of the gateway."""
    read: list[int] = []
    look = Connections.look

    async def measured(self: Connections, steps: Any, token_hash: str) -> list[Any]:
        found = await look(self, steps, token_hash)
        read.append(sum(len(line) for _, line in found[-1].rows) if hasattr(found[-1], "rows") else len(str(found[-1])))
        return found

    monkeypatch.setattr(Connections, "look", measured)
    db.pool()
    task = db.parked()
    db.claim()
    contents = [character * size for size, character in ((700_000, "a"), (700_000, "b"), (10, "c"), (900_000, "d"))]
    contents += ["e"] * 300 + ["f" * 500_000] * 5
    emit(db, task, *contents)
    db.finish(task)
    found = list(events(admin, f"/pools/gpu/tasks/{task}/events"))
    assert [part["content"] for kind, part, _ in found if kind == "part"] == contents
    assert found[-1][0] == "outcome"
    assert max(read) < 2 << 20


def test_a_stream_that_finds_no_room_any_more_is_sent_away_in_time(
    db: Database, gateways: Callable[..., Gateway], dsn: str
) -> None:
    """There was room when it was asked for, but somebody else has taken it since."""
    db.pool()
    gateway = gateways(max_streams=1)
    task = db.parked()
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    with psycopg.connect(dsn) as blocker, ThreadPoolExecutor(2) as threads:
        blocker.execute("lock table pgpark.task in access exclusive mode")
        path = f"/pools/gpu/tasks/{task}/events"
        jobs = [threads.submit(gateway.client().get, path, params={"max_secs": 2}) for _ in range(2)]
        wait_for(lambda: db.value(waiting) == 2)
        blocker.rollback()
        answers = sorted((job.result() for job in jobs), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 503]
    assert answers[1].json()["error"]["code"] == "busy"


def test_a_mailbox_is_followed_and_resumed_without_gap_or_repetition(db: Database, gateway: Gateway) -> None:
    db.pool()

    def ended(tenant: str = "a", user: str | None = None) -> int:
        task = db.parked(tenant=tenant, user_id=user)
        db.claim()
        db.finish(task)
        return task

    client = gateway.client("producer", tenants=["a"])
    before = ended()
    stream = events(client, "/mailbox/a/events")
    assert next(stream)[1]["task_id"] == before
    ended("rival")
    live = [ended() for _ in range(3)]
    got = [next(stream) for _ in range(3)]
    assert [message["task_id"] for _, message, _ in got] == live
    stream.close()
    missed = [ended() for _ in range(2)]
    stream = events(client, "/mailbox/a/events", last=got[-1][2])
    assert [next(stream)[1]["task_id"] for _ in range(2)] == missed
    stream.close()
    stream = events(client, "/mailbox/a/events", last=got[0][2], user="u")
    of_user = ended(user="u")
    assert next(stream)[1]["task_id"] == of_user


def test_a_stream_ends_when_its_token_is_revoked(db: Database, gateways: Callable[..., Gateway]) -> None:
    db.pool()
    gateway = gateways(look_secs=0.2)
    task = db.parked()
    stream = events(gateway.client("producer", name="t"), f"/pools/gpu/tasks/{task}/events")
    next(stream)
    db.rows("select pgpark.park_revoke_token('t')")
    kind, data, _ = next(stream)
    assert (kind, data["error"]["code"]) == ("error", "unauthorized")
    assert list(stream) == []


def test_a_result_is_waited_for(db: Database, gateway: Gateway, admin: httpx.Client) -> None:
    db.pool()
    task = db.parked()
    path = f"/pools/gpu/tasks/{task}/result"
    answer = admin.get(path)
    assert (answer.status_code, answer.json()["status"]) == (202, "parked")
    answer = admin.get(path, params={"wait": 0.1})
    assert (answer.status_code, answer.json()["status"]) == (202, "parked")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(admin.get, path, params={"wait": 30})
        wait_for(lambda: watching(gateway))
        db.claim()
        db.finish(task, result={"answer": 42})
        answer = waiting.result()
    assert (answer.status_code, answer.json()["payload"]) == (200, {"answer": 42})
    assert admin.get(path).json()["payload"] == {"answer": 42}


def test_a_deadline_ends_a_wait_where_no_worker_lives(db: Database, admin: httpx.Client) -> None:
    db.pool()
    task = db.parked(deadline=db.after(0.5))
    answer = admin.get(f"/pools/gpu/tasks/{task}/result", params={"wait": 30})
    assert (answer.status_code, answer.json()["status"]) == (200, "expired")


def test_a_worker_without_postgres_lives_its_whole_life(db: Database, gateway: Gateway) -> None:
    db.pool()
    worker = gateway.client("worker", pools=["gpu"])
    with ThreadPoolExecutor(1) as thread:
        wanted = {"worker": "w", "max_tasks": 3, "wait": 30}
        waiting = thread.submit(worker.post, "/pools/gpu/claims", json=wanted)
        wait_for(lambda: watching(gateway))
        first = db.parked(payload={"n": 1})
        (claimed,) = waiting.result().json()["tasks"]
    assert (claimed["task_id"], claimed["attempt"], claimed["payload"]) == (first, 1, {"n": 1})
    others = [db.parked() for _ in range(2)]
    assert len(worker.post("/pools/gpu/claims", json=wanted).json()["tasks"]) == 2
    beat = worker.post("/pools/gpu/heartbeat", json={"worker": "w", "task_ids": [first, *others]})
    assert beat.json() == {"stop": []}
    part = {"task_id": first, "attempt": 1, "parts": [{"content": "a"}, {"kind": "progress", "content": 0.5}]}
    assert worker.post("/pools/gpu/parts", json={"emissions": [part]}).json()["outcomes"][0]["accepted"]
    done = [{"task_id": first, "attempt": 1, "result": "x"}, {"task_id": others[0], "attempt": 7}]
    answer = worker.post("/pools/gpu/finish", json={"outcomes": done}).json()["outcomes"]
    assert [row["accepted"] for row in answer] == [True, False]
    held = [{"task_id": task, "attempt": 1} for task in others]
    assert [row["accepted"] for row in worker.post("/pools/gpu/release", json={"tasks": held}).json()["outcomes"]] == [
        True,
        True,
    ]
    assert db.outcome(first) == ("completed", None)
    assert db.stats()["parked"] == 2


def test_a_worker_that_hangs_up_takes_no_task(db: Database, gateway: Gateway) -> None:
    db.pool()
    client = gateway.client("worker")

    def hang_up() -> None:
        try:
            client.post("/pools/gpu/claims", json={"worker": "w", "wait": 30}, timeout=1)
        except httpx.ReadTimeout:
            return

    hang_up()
    wait_for(lambda: not watching(gateway), what="for the gateway to notice")
    task = db.parked()
    assert db.status(task)["status"] == "parked"


def test_one_task_goes_to_one_of_many_workers_that_wait(db: Database, gateways: Callable[..., Gateway]) -> None:
    db.pool()
    gateway, other = gateways(), gateways()
    clients = [gateway.client("worker") for _ in range(4)] + [other.client("worker") for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        waiting = [
            threads.submit(client.post, "/pools/gpu/claims", json={"worker": f"w{n}", "wait": 20})
            for n, client in enumerate(clients)
        ]
        wait_for(lambda: watching(gateway) == 4 and watching(other) == 4)
        tasks = [db.parked() for _ in range(8)]
        claimed = [job.result().json()["tasks"] for job in waiting]
    assert sorted(task["task_id"] for row in claimed for task in row) == tasks


def test_what_one_gateway_takes_the_other_tells(db: Database, gateways: Callable[..., Gateway]) -> None:
    db.pool()
    gateway, other = gateways(), gateways()
    task = gateway.client().post("/pools/gpu/tasks", json={"payload": 1, "tenant": "a"}).json()["task_id"]
    stream = events(other.client(), "/mailbox/a/events")
    claimed = gateway.client().post("/pools/gpu/claims", json={"worker": "w"}).json()["tasks"]
    gateway.client().post("/pools/gpu/finish", json={"outcomes": [{"task_id": claimed[0]["task_id"], "attempt": 1}]})
    assert next(stream)[1]["task_id"] == task


def test_without_notifications_those_who_wait_look(db: Database, gateways: Callable[..., Gateway]) -> None:
    db.pool()
    gateway = gateways(listen=False, look_secs=0.2)
    task = db.parked()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(gateway.client().get, f"/pools/gpu/tasks/{task}/result", params={"wait": 30})
        wait_for(lambda: watching(gateway))
        db.claim()
        db.finish(task)
        assert waiting.result().status_code == 200


CROWD = textwrap.dedent(
    """
    import asyncio, sys

    async def client(host, port, token, task, told):
        reader, writer = await asyncio.open_connection(host, int(port))
        path = f"/pools/gpu/tasks/{task}/events"
        writer.write(f"GET {path} HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Bearer {token}\\r\\n\\r\\n".encode())
        seen = b""
        while b"event: outcome" not in seen:
            piece = await reader.read(65536)
            assert piece, seen
            if not seen:
                told.release()
            seen += piece
        writer.close()

    async def main(host, port, token, *tasks):
        told = asyncio.Semaphore(0)
        jobs = [asyncio.create_task(client(host, port, token, task, told)) for task in tasks]
        for _ in jobs:
            await told.acquire()
        print("waiting", flush=True)
        await asyncio.gather(*jobs)
        print("done", flush=True)

    asyncio.run(main(*sys.argv[1:]))
    """
)


def test_a_full_pool_answers_at_once_while_500_clients_wait(db: Database, gateways: Callable[..., Gateway]) -> None:
    db.pool("gpu", max_units=1000, max_queue_depth=500)
    gateway = gateways(max_connections=5)
    rows = db.rows(
        "select task_id from pgpark.park_submit_many('gpu', (select jsonb_agg('{\"payload\": 1}'::jsonb)"
        " from generate_series(1, 500)))"
    )
    tasks = [row["task_id"] for row in rows]
    host, port = gateway.url.removeprefix("http://").split(":")

    async def crowd() -> None:
        arguments = [host, port, gateway.secret(), *map(str, tasks)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CROWD, *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"waiting\n"
        await asyncio.to_thread(look_around)
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"done\n"
        assert await process.wait() == 0

    def look_around() -> None:
        connections = "select count(*) from pg_stat_activity where datname = current_database() and pid <> %s"
        wait_for(lambda: watching(gateway) == 500)
        assert db.value(connections, db.connection.info.backend_pid) <= 6  # five, and the one that listens
        client = gateway.client()
        answers = [client.post("/pools/gpu/tasks", json={"payload": 1}) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {409}
        assert all(answer.headers["Retry-After"] for answer in answers)
        assert sorted(answer.elapsed.total_seconds() for answer in answers)[10] < 1
        db.claim(max_tasks=500)
        db.rows("select from pgpark.park_finish_many(%s)", Jsonb([{"task_id": task, "attempt": 1} for task in tasks]))

    asyncio.run(crowd())


def test_more_clients_than_may_wait_are_sent_away(db: Database, gateways: Callable[..., Gateway]) -> None:
    db.pool()
    gateway = gateways(max_streams=1)
    client = gateway.client()
    task = db.parked()
    with client.stream("GET", f"/pools/gpu/tasks/{task}/events") as stream:
        pieces = stream.iter_bytes()
        next(pieces)
        for path in ("result?wait=5", "events"):
            answer = client.get(f"/pools/gpu/tasks/{task}/{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
            assert answer.headers["Retry-After"]
    wait_for(lambda: not watching(gateway), what="for the gateway to notice that the client left")


def test_no_free_connection_is_a_quick_503(db: Database, gateways: Callable[..., Gateway], dsn: str) -> None:
    db.pool()
    gateway = gateways(max_connections=1, connection_secs=0.3)
    client = gateway.client()
    other = gateway.client("reader")
    assert client.get("/pools").status_code == 200
    with psycopg.connect(dsn) as blocker, ThreadPoolExecutor(1) as thread:
        blocker.execute("lock table pgpark.pool in access exclusive mode")
        stuck = thread.submit(client.get, "/pools")
        blocked = (
            "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        wait_for(lambda: db.value(blocked))
        answer = other.get("/pools")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
        assert answer.headers["Retry-After"]
        assert answer.elapsed.total_seconds() < 5
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        blocker.rollback()
        assert stuck.result().status_code == 200
