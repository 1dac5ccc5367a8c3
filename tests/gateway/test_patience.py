"""Clients that take their time, and more of it than they need: half a request, no end, an answer that nobody takes."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pgpark.gateway import guard
from pgpark.gateway.connections import BusyError, Connections
from pgpark.gateway.protocol import ImpatientProtocol
from pgpark.gateway.settings import GatewaySettings
from tests.conftest import Database, wait_for
from tests.gateway.conftest import Gateway
from tests.gateway.test_live import emit, watching
from tests.gateway.test_strangers import code

CHUNKED = b"POST /pools HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def call(gateway: Gateway, said: bytes) -> socket.socket:
    """A connection on which this was said."""
    host, port = gateway.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(said)
    return connection


def until_it_hangs_up(connection: socket.socket) -> bytes:
    """What it says until then."""
    heard = b""
    try:
        while piece := connection.recv(65536):
            heard += piece
    except ConnectionError:
        pass
    connection.close()
    return heard


@pytest.mark.parametrize("said", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX: 1\r\n"])
def test_who_does_not_say_what_it_wants_is_hung_up_on(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(ImpatientProtocol, "OWED_SECS", 0.2)
    assert until_it_hangs_up(call(gateway, said)) == b""


def test_half_of_a_second_request_is_no_better(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with call(gateway, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert b"200 OK" in connection.recv(65536)
        monkeypatch.setattr(ImpatientProtocol, "OWED_SECS", 0.2)
        connection.sendall(b"GET /hea")
        assert b"HTTP/1.1" not in until_it_hangs_up(connection)


def test_a_request_takes_its_time_though(db: Database, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience is with a request that is not there yet, not with one that waits, nor with a body under way."""
    db.pool()
    task = db.parked()
    client = gateway.client()
    assert client.get("/health").status_code == 200
    monkeypatch.setattr(ImpatientProtocol, "OWED_SECS", 0.2)
    answer = client.get(f"/pools/gpu/tasks/{task}/result", params={"wait": 1})
    assert (answer.status_code, answer.json()["status"]) == (202, "parked")


def test_who_goes_on_after_the_answer_is_hung_up_on(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImpatientProtocol, "WASTED_BYTES", 100_000)
    with call(gateway, CHUNKED) as connection:
        assert b"401 Unauthorized" in connection.recv(65536)
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def test_who_never_comes_to_an_end_after_the_answer_is_hung_up_on(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with call(gateway, CHUNKED) as connection:
        assert b"401 Unauthorized" in connection.recv(65536)
        monkeypatch.setattr(ImpatientProtocol, "OWED_SECS", 0.2)
        connection.sendall(b"1\r\nx\r\n")
        assert b"HTTP/1.1" not in until_it_hangs_up(connection)


def test_what_anybody_may_see_takes_no_body(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_SECS", 0.2)
    for method in (b"GET", b"POST"):
        with call(gateway, method + b" /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n") as connection:
            status = connection.recv(65536).split()[1]
            assert status == (b"200" if method == b"GET" else b"405")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel does not tell")
def test_who_takes_nothing_of_a_stream_gives_up_its_place(
    db: Database, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImpatientProtocol, "TAKEN_SECS", 0.5)
    db.pool()
    task = db.parked()
    db.claim()
    for _ in range(10):
        emit(db, task, "x" * 1_000_000)
    asked = (
        f"GET /pools/gpu/tasks/{task}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.secret()}\r\n\r\n"
    )
    with call(gateway, asked.encode()):
        wait_for(lambda: watching(gateway) == 1)
        wait_for(lambda: watching(gateway) == 0, what="for its place to be free")


def test_who_takes_nothing_does_not_keep_a_gateway_from_stopping(
    db: Database, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ImpatientProtocol, "LEAVING_SECS", 0.2)
    db.pool()
    task = db.parked()
    db.claim()
    for _ in range(10):
        emit(db, task, "x" * 1_000_000)
    gateway = Gateway(db, GatewaySettings(db.dsn))
    asked = (
        f"GET /pools/gpu/tasks/{task}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.secret()}\r\n\r\n"
    )
    with call(gateway, asked.encode()):
        stuck = gateway.server.server_state.connections
        wait_for(lambda: [connection.flow.write_paused for connection in stuck] == [True])
        gateway.close()
    assert capfd.readouterr().err == ""  # or uvicorn would tell what it has cancelled


def test_what_the_database_fails_for_one_of_a_crowd_it_fails_for_all(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All carry one token, and one of them asks whether it is known: they must not be failed one after the other."""
    asked: list[str] = []
    may_fail = threading.Event()

    async def stuck(_self: Connections, _call: Any, _token_hash: str | None = None) -> None:
        asked.append("")
        while not may_fail.is_set():
            await asyncio.sleep(0.01)
        raise BusyError("the database took too long")

    client = gateway.client()
    monkeypatch.setattr(Connections, "run", stuck)
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(client.get, "/pools") for _ in range(4)]
        wait_for(lambda: len(gateway.server.server_state.tasks) == 4)
        may_fail.set()
        assert {code(job.result()) for job in jobs} == {(503, "busy")}
    assert len(asked) == 1
    assert code(client.get("/pools")) == (503, "busy")  # who comes later asks anew
    assert len(asked) == 2
