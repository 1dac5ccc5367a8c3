"""A network between workers and server that fails, and a pooler between all of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pwd
import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pgpark import AsyncPool, Client, Message, build_pools, build_pools_async, calls
from pgpark.database import connect
from pgpark.errors import DatabaseError
from pgpark.gateway.settings import GatewaySettings
from pgpark.migrate import migrate
from tests.chaos.conftest import required
from tests.chaos.lot import CONFIG, Lot
from tests.chaos.postmaster import SYSTEM_USER, Postmaster, free_port
from tests.chaos.proxy import Proxy
from tests.conftest import Database, wait_for
from tests.gateway.conftest import Gateway

LEASE = float(CONFIG["lease_secs"])


@pytest.fixture
def proxied(new_server: Callable[..., Postmaster], ends: ExitStack) -> tuple[Postmaster, Proxy]:
    server = new_server()
    proxy = Proxy(server.port)
    ends.callback(proxy.close)
    return server, proxy


def through(proxy: Proxy, server: Postmaster) -> str:
    return f"{server.dsn} port={proxy.port}".replace(f"port={server.port} ", "")


def test_the_network_of_the_workers_fails_in_every_way(proxied: tuple[Postmaster, Proxy], minutes: float) -> None:
    server, proxy = proxied
    lot = Lot(server.dsn, worker_dsn=through(proxy, server), workers=1)
    lot.workers.append(lot.worker("direct", dsn=server.dsn))

    def drop() -> None:
        lot.events["connections dropped"] += proxy.drop()

    def hang() -> None:
        """Longer than the leases: what ran there is lost to the other worker, and comes back late."""
        proxy.hang()
        time.sleep(LEASE * random.uniform(1, 2))
        proxy.resume()
        lot.events["cuts"] += 1

    def slow_down() -> None:
        proxy.delay = random.choice([0, 0.05, 0.3])
        lot.events["delays"] += 1

    with lot.at_work():
        ways = itertools.cycle([drop, hang, slow_down])
        lot.break_for(minutes, lambda: next(ways)(), at_least=6)
        proxy.delay = 0
        lot.settle()


def test_a_worker_that_comes_back_after_its_lease_has_lapsed_changes_nothing(
    proxied: tuple[Postmaster, Proxy], minutes: float
) -> None:
    server, proxy = proxied
    lot = Lot(server.dsn, worker_dsn=through(proxy, server), workers=1, secs=0.5, config={"max_units": 20})
    cut_off = lot.workers[0]
    lot.workers.append(lot.worker("direct", dsn=server.dsn))

    def cut() -> None:
        held = "select count(*) from pgpark.task where worker = 'w0' and state = 'running'"
        wait_for(lambda: server.rows(held) > [(1,)])
        proxy.hang()
        wait_for(lambda: server.rows(held) == [(0,)], what="for the leases to lapse")
        proxy.resume()
        lot.events["cuts"] += 1

    with lot.at_work():
        lot.break_for(minutes, cut, at_least=2)
        lot.settle()
    assert "its outcome came too late" in cut_off.logged()


def test_connections_that_hang_for_good_are_given_up(proxied: tuple[Postmaster, Proxy], minutes: float) -> None:
    """What is sent into them is confirmed, so TCP sees nothing wrong."""
    server, proxy = proxied
    lot = Lot(server.dsn, worker_dsn=f"{through(proxy, server)} tcp_user_timeout=3000", workers=1)

    def forget() -> None:
        lot.events["connections forgotten"] += proxy.forget()

    with lot.at_work():
        lot.break_for(minutes, forget, at_least=2)
        lot.settle()


@pytest.fixture
def pooled(
    new_server: Callable[..., Postmaster], new_folder: Callable[[], Path], ends: ExitStack
) -> tuple[Postmaster, Callable[[], None], str]:
    """A server, PgBouncer in transaction mode before it, how to restart that, and its DSN."""
    program = required("pgbouncer")
    server, folder, port = new_server(), new_folder(), free_port()
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {folder}/users\n"
        f"pool_mode = transaction\ndefault_pool_size = 4\nlogfile = {folder}/log\n"
    )
    command = [program, str(folder / "ini")]
    if os.geteuid() == 0:
        owner = pwd.getpwnam(SYSTEM_USER)
        for path in (folder, *folder.iterdir()):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        command = ["runuser", "-u", SYSTEM_USER, "--", *command]
    dsn = server.dsn.replace(f"port={server.port}", f"port={port}")
    running: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        for process in running:
            process.kill() if os.geteuid() else subprocess.run(["pkill", "-9", "-f", str(folder / "ini")], check=False)
            process.wait()
        running.clear()

    def restart() -> None:
        stop()
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    restart()
    ends.callback(stop)
    return server, restart, dsn


def test_pgbouncer_in_transaction_mode(pooled: tuple[Postmaster, Callable[[], None], str], minutes: float) -> None:
    server, restart, dsn = pooled
    lot = Lot(server.dsn, worker_dsn=dsn, options=("--poll", "--poll-secs", "0.2"))

    def crash() -> None:
        restart()
        lot.events["poolers killed"] += 1

    with lot.at_work():
        lot.break_for(minutes, crash)
        lot.settle()


def test_clients_and_pools_that_poll_work_behind_pgbouncer(pooled: tuple[Postmaster, Callable[[], None], str]) -> None:
    """Many calls of each of several sessions, which share four connections to the server."""
    server, _, dsn = pooled
    with contextlib.closing(connect(server.dsn)) as connection:
        migrate(connection)
    wait_for(lambda: answers(dsn), what="for PgBouncer")
    config = {"pools": {"gpu": {"max_units": 8}}}

    def echo(payload: int) -> int:
        return payload

    def ask_pool() -> None:
        with build_pools(config, dsn=dsn, poll=True) as pools, ThreadPoolExecutor(8) as threads:
            pool = pools["gpu"]
            ids = list(threads.map(lambda number: pool.submit(number).task_id, range(40)))
            assert [pool.result(task_id, 60).payload for task_id in ids] == list(range(40))  # type: ignore[union-attr]

    def ask_clients() -> None:
        with Client(dsn, poll=True) as one, Client(dsn, poll=True) as other:
            for client in (one, other) * 4:
                task_id = client.run(calls.submit("gpu", 1)).task_id
                assert task_id is not None
                assert client.wait(task_id, 60) is not None
                assert [item.payload for item in client.stream(task_id, 60) if isinstance(item, Message)] == [1]

    async def ask(number: int, pool: AsyncPool) -> Any:
        message = await pool.result((await pool.submit(number)).task_id, 60)
        return message and message.payload

    async def main() -> None:
        async with build_pools_async(config, dsn=dsn, poll=True) as pools:
            worker = pools["gpu"].worker(echo)
            working = asyncio.create_task(worker.serve())
            try:
                assert await asyncio.gather(*(ask(number, pools["gpu"]) for number in range(40))) == list(range(40))
                await asyncio.to_thread(ask_pool)
                await asyncio.to_thread(ask_clients)
            finally:
                worker.stop()
                await asyncio.wait_for(working, 60)

    asyncio.run(main())


def test_a_gateway_that_polls_works_behind_pgbouncer(pooled: tuple[Postmaster, Callable[[], None], str]) -> None:
    server, _, dsn = pooled
    with contextlib.closing(connect(server.dsn)) as connection:
        migrate(connection)
    wait_for(lambda: answers(dsn), what="for PgBouncer")
    with contextlib.closing(Database(server.dsn)) as db:
        db.pool()
        gateway = Gateway(db, GatewaySettings(dsn, listen=False, look_secs=0.5))
        try:
            mine, worker = gateway.client("producer", tenants=["t"]), gateway.client("worker")
            strange = gateway.client("producer", tenants=["u"])

            def go_through(number: int) -> None:
                task = mine.post("/pools/gpu/tasks", json={"payload": number, "tenant": "t"}).json()["task_id"]
                assert strange.get(f"/pools/gpu/tasks/{task}").status_code == 404
                waited = mine.get(f"/pools/gpu/tasks/{task}/result", params={"wait": 60})
                assert (waited.status_code, waited.json()["payload"]) == (200, number)

            def work() -> None:
                for _ in range(16):
                    (held,) = worker.post("/pools/gpu/claims", json={"worker": "w", "wait": 60}).json()["tasks"]
                    outcome = {key: held[key] for key in ("task_id", "attempt")} | {"result": held["payload"]}
                    worker.post("/pools/gpu/finish", json={"outcomes": [outcome]}).raise_for_status()

            with ThreadPoolExecutor(9) as threads:
                working = threads.submit(work)
                assert len(list(threads.map(go_through, range(16)))) == 16
                working.result(60)
        finally:
            gateway.close()


def answers(dsn: str) -> bool:
    try:
        connect(dsn).close()
    except DatabaseError:
        return False
    return True
