"""A server that is killed, restarted, emptied of connections and of disk, and replaced by its replica."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from tests.chaos.lot import Lot
from tests.chaos.postmaster import Postmaster
from tests.conftest import wait_for

NewServer = Callable[..., Postmaster]
TERMINATE = "select count(pg_terminate_backend(pid)) from pg_stat_activity where pid <> pg_backend_pid() and {}"


def test_postgres_is_killed_and_restarted_under_load(new_server: NewServer, minutes: float) -> None:
    server = new_server()
    lot = Lot(server.dsn)

    def crash() -> None:
        server.kill()
        lot.events["servers killed"] += 1
        server.start()

    with lot.at_work():
        lot.break_for(minutes, crash)
        lot.settle()


def test_postgres_is_restarted_and_backends_crash(new_server: NewServer, minutes: float) -> None:
    server = new_server()
    lot = Lot(server.dsn)

    def stop_politely() -> None:
        server.stop(random.choice(["fast", "immediate"]))
        lot.events["servers stopped"] += 1
        server.start()

    def crash_backend() -> None:
        with contextlib.suppress(psycopg.Error):
            pids = server.rows("select pid from pg_stat_activity where application_name = 'pgpark'")
            os.kill(int(str(random.choice(pids)[0])), 9)
            lot.events["backends killed"] += 1
        wait_for(server.answers)

    with lot.at_work():
        ways = itertools.cycle([stop_politely, crash_backend])
        lot.break_for(minutes, lambda: next(ways)(), at_least=4)
        lot.settle()


def test_every_connection_is_terminated(new_server: NewServer, minutes: float) -> None:
    server = new_server()
    lot = Lot(server.dsn)

    def cut() -> None:
        ((count,),) = server.rows(TERMINATE.format("backend_type = 'client backend'"))
        lot.events["connections terminated"] += int(str(count))

    with lot.at_work():
        lot.break_for(minutes, cut)
        lot.settle()


def test_a_server_out_of_connections(new_server: NewServer, minutes: float) -> None:
    server = new_server(max_connections="16")
    lot = Lot(server.dsn)

    def crowd() -> None:
        """Takes all that are left, also those that workers and clients are cut from."""
        with contextlib.ExitStack() as held:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                try:
                    held.enter_context(psycopg.connect(server.dsn, dbname="template1"))
                except psycopg.OperationalError:
                    lot.events["connections refused"] += 1
                    time.sleep(0.05)
                with (
                    contextlib.suppress(psycopg.Error),
                    psycopg.connect(server.dsn, autocommit=True) as connection,
                ):
                    connection.execute(TERMINATE.format("datname = 'postgres'").encode())

    with lot.at_work():
        lot.break_for(minutes, crowd, at_least=2)
        assert lot.settle()["connections refused"]


def test_a_transaction_that_stays_open_with_an_old_snapshot(new_server: NewServer, minutes: float) -> None:
    server = new_server(autovacuum_naptime="1")
    lot = Lot(server.dsn, secs=0.02)

    def hold() -> None:
        with psycopg.connect(server.dsn) as reader:
            reader.execute("set transaction isolation level repeatable read")
            reader.execute("select count(*) from pgpark.task")
            lot.progress(100)
            lot.events["snapshots held"] += 1

    with lot.at_work():
        lot.break_for(minutes, hold, at_least=2)
        lot.settle()


@pytest.fixture
def small_disk(new_folder: Callable[[], Path]) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = new_folder()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be made here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_of_the_log_is_full(
    new_folder: Callable[[], Path], small_disk: Path, ends: ExitStack, minutes: float
) -> None:
    server = Postmaster(new_folder(), wal_keep_size="0", max_wal_size="32MB", min_wal_size="32MB")
    os.chmod(small_disk, 0o777)  # noqa: PTH101
    ends.callback(server.remove)
    server.create("-X", str(small_disk / "wal")).start()
    lot = Lot(server.dsn)

    def fill() -> None:
        """The server stops writing, and with that altogether; once there is room it recovers by itself."""
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 20))
                file.flush()
        with contextlib.suppress(psycopg.Error), psycopg.connect(server.dsn, autocommit=True) as connection:
            while True:  # until what is left of the present segments is written too
                connection.execute("select pg_logical_emit_message(false, 'fill', repeat('x', 1000000))")
        ballast.unlink()
        lot.events["disks full"] += 1
        wait_for(lambda: server.answers() or restart(server), 60)

    with lot.at_work():
        lot.break_for(minutes, fill, at_least=2)
        lot.settle()
    assert "No space left on device" in (server.folder / "log").read_text()


def restart(server: Postmaster) -> bool:
    """Starts a server that has given up for want of space."""
    with contextlib.suppress(AssertionError):
        server.start()
    return False


def test_a_replica_takes_over(
    new_server: NewServer, new_folder: Callable[[], Path], ends: ExitStack, minutes: float
) -> None:
    """The server is killed, its replica promoted, and a new replica made in the place of the old server; workers and
    clients know both places. Replication is synchronous: what was told to be accepted is there."""
    server = new_server(synchronous_commit="remote_apply")

    def replicate(port: int | None = None) -> Postmaster:
        replica = server.copy(new_folder(), port)
        ends.callback(replica.remove)
        replica.start()
        server.configure("synchronous_standby_names", "*")
        wait_for(lambda: server.rows("select from pg_stat_replication where sync_state = 'sync'"))
        return replica

    replica = replicate()
    hosts = f"127.0.0.1,127.0.0.1 port={server.port},{replica.port}"
    lot = Lot(f"host={hosts} user=postgres dbname=postgres target_session_attrs=read-write connect_timeout=3")

    def fail_over() -> None:
        nonlocal server, replica
        server.kill()
        replica.promote()
        replica.configure("synchronous_standby_names", "")  # it need not wait for a replica of its own
        lot.events["failovers"] += 1
        lot.progress(10)
        dead, server = server, replica
        replica = replicate(dead.port)

    with lot.at_work():
        lot.break_for(minutes, fail_over, at_least=1)
        lot.settle()
