"""`pgpark serve` and `pgpark token` as processes: what is printed, tokens of their own, and stopping."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.conftest import Database, wait_for
from tests.gateway.test_live import events

Serve = Callable[..., tuple["subprocess.Popen[str]", str]]


def pgpark(dsn: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PGPARK_DSN": dsn} | options.pop("env", {})
    command = [sys.executable, "-m", "pgpark", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def serve(dsn: str) -> Iterator[Serve]:
    """Starts `pgpark serve` on a free port; gives the process and the line that it prints."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgpark", "serve", "--port", "0", *options],
            env=os.environ | {"PGPARK_DSN": dsn},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_gateway_for_oneself_prints_its_page_with_a_token_and_revokes_it(db: Database, serve: Serve) -> None:
    db.pool()
    process, line = serve("--drain", "0")
    url, _, token = line.partition("#token=")
    assert url.startswith("http://127.0.0.1:") and token.startswith("park_")
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{url}pools", headers=headers).json()["pools"][0]["pool"] == "gpu"
    (row,) = db.rows("select *, expires_at - now() as left from pgpark.park_tokens()")
    assert row["kinds"] == ["admin"]
    assert 0 < row["left"].total_seconds() <= 24 * 3600
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert db.rows("select * from pgpark.park_tokens()") == []


def test_where_there_are_tokens_none_is_made(db: Database, serve: Serve) -> None:
    db.value("select pgpark.park_create_token('mine', '{reader}')")
    process, line = serve()
    assert "token" not in line
    assert process.stderr is not None
    assert "pgpark token create NAME --as admin" in process.stderr.readline()


def test_no_token_is_made_where_others_can_reach_it(db: Database, serve: Serve) -> None:
    assert serve("--host", "0.0.0.0")[1].startswith("http://0.0.0.0:")
    assert "token" not in serve("--no-local-token")[1]
    assert db.rows("select * from pgpark.park_tokens()") == []


def test_a_gateway_that_is_told_to_stop_breaks_nothing(db: Database, serve: Serve) -> None:
    db.pool()
    process, line = serve("--drain", "1.5")
    url, _, token = line.partition("#token=")
    task = db.parked()
    kept: list[Any] = []
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as client:
        stream = events(client, f"/pools/gpu/tasks/{task}/events", max_secs=60)
        next(stream)
        raw: list[str] = []

        def read_raw() -> None:
            with httpx.Client(base_url=url, headers=client.headers, timeout=30) as other:
                raw.append(other.get(f"/pools/gpu/tasks/{task}/events").text)

        def wait_long() -> None:
            with httpx.Client(base_url=url, headers=client.headers, timeout=30) as other:
                kept.append(other.get(f"/pools/gpu/tasks/{task}/result", params={"wait": 30}))

        threads = [threading.Thread(target=work) for work in (read_raw, wait_long)]
        for thread in threads:
            thread.start()
        assert client.get("/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json()["error"]["code"] == "stopping"
        assert client.post("/pools/gpu/tasks", json={"payload": 1}).status_code == 202  # not yet everybody knows
        assert list(stream) == []
        for thread in threads:
            thread.join(20)
    assert "retry: " in raw[0]
    assert kept[0].status_code == 202  # where the task is, not a broken connection
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_a_gateway_that_stops_does_not_wait_for_a_locked_database(serve: Serve, dsn: str) -> None:
    process, line = serve("--drain", "0")
    assert "token=" in line
    with psycopg.connect(dsn) as blocker:
        blocker.execute("lock table pgpark.token in access exclusive mode")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert process.stderr is not None
    assert "the local token was not revoked, and expires by itself" in process.stderr.read()


def test_each_line_of_the_log_is_a_json_object(db: Database, serve: Serve) -> None:
    db.pool()
    process, line = serve("--log-json", "--drain", "0", "--no-local-token")
    host, port = line.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        stranger.sendall(b"no HTTP at all\r\n\r\n")
        assert b"400 Bad Request" in stranger.recv(65536)
    token = db.value("select pgpark.park_create_token('t', '{admin}')")
    headers = {"Authorization": f"Bearer {token}"}
    db.connection.execute("alter function pgpark.park_stats(text) rename to park_no_stats")
    assert httpx.get(f"{line}pools", headers=headers).status_code == 503
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr is not None
    told = [json.loads(text) for text in process.stderr]
    assert {frozenset(entry) for entry in told} == {frozenset(("time", "level", "logger", "message"))}
    messages = [(entry["level"], entry["logger"], entry["message"]) for entry in told]
    assert ("INFO", "pgpark.gateway", "stopping in 0 s; not ready from now on") in messages
    assert any(level == "WARNING" and "park_stats" in message for level, _, message in messages)
    assert not any("HTTP" in message for _, _, message in messages)  # strangers do not fill the log


def test_tokens_from_the_command_line(db: Database, dsn: str) -> None:
    db.pool()
    made = pgpark(dsn, "token", "create", "web", "--as", "producer", "--tenant", "a", "--expires", "+1h", "--rate", "5")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith("park_") and made.stdout.count("\n") == 1
    listed = pgpark(dsn, "token", "list", "--json")
    assert '"name":"web","kinds":["producer"],"tenants":["a"]' in listed.stdout
    assert made.stdout.strip() not in listed.stdout
    again = pgpark(dsn, "token", "create", "web", "--as", "reader")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "there is a token 'web' already" in again.stderr
    assert pgpark(dsn, "token", "revoke", "web").returncode == 0
    assert pgpark(dsn, "token", "revoke", "web").returncode == 1


def test_what_cannot_be_served_is_told_in_a_line(dsn: str, empty_databases: Callable[[], str], tmp_path: Path) -> None:
    hidden = tmp_path / "fastapi.py"
    hidden.write_text("raise ModuleNotFoundError('No module named fastapi', name='fastapi')")
    missing = "fastapi is not installed; pgpark serve needs: pip install 'pgpark[gateway]'"
    tries = [
        (dsn, ("--host", "203.0.113.1"), {}, 2, "cannot listen on 203.0.113.1:8080"),
        (dsn, ("--host", "no.such.host.invalid"), {}, 2, "cannot listen on no.such.host.invalid"),
        (dsn, ("--port", "99999"), {}, 2, "99999"),
        (empty_databases(), (), {}, 3, "pgpark migrate"),
        ("host=/nowhere dbname=x", (), {}, 3, "cannot connect"),
        (dsn, (), {"PYTHONPATH": str(tmp_path)}, 2, missing),
    ]  # fmt: skip
    for database, options, environment, code, message in tries:
        done = pgpark(database, "serve", *options, env=environment)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.count("\n") == 1 and message in done.stderr
