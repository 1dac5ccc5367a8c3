"""A network between workers and server that fails, and a pooler between all of them."""

from __future__ import annotations

import itertools
import os
import pwd
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.conftest import required
from tests.chaos.lot import CONFIG, Lot
from tests.chaos.postmaster import SYSTEM_USER, Postmaster, free_port
from tests.chaos.proxy import Proxy
from tests.conftest import wait_for

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
