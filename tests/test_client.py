"""The Python clients, the package as it is installed, and calls inside the caller's own transaction."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import venv
from pathlib import Path

import psycopg
import pytest

from pgpark import AsyncClient, Client, calls
from pgpark.errors import BadInputError, DatabaseError, PoolInUseError, UnknownPoolError, WrongIsolationError
from tests.conftest import Database

ROOT = Path(__file__).parent.parent


def test_the_sync_client_runs_the_whole_path(dsn: str) -> None:
    with Client(dsn) as park:
        assert park.run(calls.put_pool("gpu", {"max_units": 24})) == "created"
        task = park.run(calls.submit("gpu", {"x": 1}, units=8, tenant="t"))
        assert task.task_id is not None
        (claimed,) = park.run(calls.claim("gpu", "w", max_tasks=5, max_units=10))
        assert (claimed.task_id, claimed.payload, claimed.units) == (task.task_id, {"x": 1}, 8)
        assert park.run(calls.heartbeat("gpu", "w", [claimed.task_id])) == []
        assert park.run(calls.finish(claimed.task_id, claimed.attempt, result=[1, 2]))
        (message,) = park.run(calls.fetch("t"))
        assert (message.status, message.payload) == ("completed", [1, 2])
        assert park.run(calls.ack([message.message_id])) == 1


def test_every_call_has_a_function_of_this_shape(db: Database) -> None:
    """A call that names an argument or column that the SQL does not have fails here."""
    db.pool(cost_model={"model_vram_gb": 1, "kv_per_token_mb": 1, "max_batch_tokens": 1})
    with Client(db.dsn) as park:
        task = park.run(calls.submit("gpu", 1, run_at="2030-01-01", deadline="2031-01-01")).task_id
        assert task is not None
        assert park.run(calls.submit_many("gpu", [{"payload": 1}]))[0].accepted
        assert park.run(calls.status(task)) and park.run(calls.stats("gpu")) and park.run(calls.explain("gpu"))
        assert park.run(calls.result(task)) is None
        assert park.run(calls.release(task, 1)) is False
        assert park.run(calls.finish_many([{"task_id": task, "attempt": 1}]))[0].accepted is False
        assert park.run(calls.cancel(task)) == "dropped"
        assert park.run(calls.prune()) == 0
        assert 0 < (park.run(calls.maintain("gpu")).due_in_secs or 0) <= 1, "something could start"
        assert park.run(calls.pools())[0].settings["max_units"] == 24
        assert park.run(calls.llm_units("gpu", 1, 1)) == 2
        park.run(calls.set_pool_state("gpu", "draining"))
        park.run(calls.drop_pool("gpu", force=True))


def test_the_async_client_runs_calls_side_by_side(dsn: str) -> None:
    async def main() -> None:
        async with AsyncClient(dsn) as park:
            await park.run(calls.put_pool("gpu", {"max_units": 24}))
            rows = await asyncio.gather(*(park.run(calls.submit("gpu", n)) for n in range(10)))
            assert len({row.task_id for row in rows}) == 10

    asyncio.run(main())


def test_a_client_that_is_not_open_says_so(dsn: str) -> None:
    with pytest.raises(DatabaseError, match="this client is not open"):
        asyncio.run(AsyncClient(dsn).run(calls.stats()))


def test_errors_have_a_class_of_their_own(db: Database) -> None:
    db.pool()
    db.parked()
    with Client(db.dsn) as park:
        with pytest.raises(UnknownPoolError):
            park.run(calls.stats("nope"))
        with pytest.raises(BadInputError, match="unknown priority"):
            park.run(calls.submit("gpu", 1, priority="urgent"))
        with pytest.raises(BadInputError) as caught:
            park.run(calls.submit_many("gpu", [{"payload": 1}, {}]))
        assert caught.value.element == 2
        with pytest.raises(PoolInUseError):
            park.run(calls.drop_pool("gpu"))
    with psycopg.connect(db.dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        with pytest.raises(WrongIsolationError, match="needs READ COMMITTED"):
            calls.run_on(connection, calls.claim("gpu", "w"))


@pytest.mark.parametrize("text", ["a\0b", "half a pair \ud83d"])
def test_text_that_postgres_cannot_keep_is_bad_input_that_is_named(text: str) -> None:
    with pytest.raises(BadInputError, match="user_id must not hold"):
        calls.submit("gpu", {}, user_id=text)
    with pytest.raises(BadInputError, match="tenants must not hold"):
        calls.grant("web", "producer", tenants=["acme", text])


def test_a_call_takes_part_in_the_callers_transaction(db: Database) -> None:
    db.pool()
    with psycopg.connect(db.dsn) as connection:
        calls.run_on(connection, calls.submit("gpu", 1))
        assert db.stats()["parked"] == 0
        connection.rollback()
        calls.run_on(connection, calls.submit("gpu", 2))
    assert [row["payload"] for row in db.claim()] == [2]


def test_the_async_client_waits_for_an_outcome(db: Database) -> None:
    db.pool()
    task = db.parked()
    db.claim()

    async def main() -> None:
        async with AsyncClient(db.dsn) as park:
            assert await park.wait(task, timeout=0.1) is None
            waiting = asyncio.create_task(park.wait(task, timeout=30))
            await asyncio.sleep(0.1)
            await park.run(calls.finish(task, 1, result=5))
            message = await waiting
            assert message is not None and message.payload == 5

    asyncio.run(main())


def test_wait_gives_up_after_its_timeout(db: Database) -> None:
    db.pool()
    task = db.parked()
    with Client(db.dsn) as park:
        began = time.monotonic()
        assert park.wait(task, timeout=0.2) is None
        assert time.monotonic() - began >= 0.2
        assert park.run(calls.status(task)) is not None, "the connection is still good"


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(tmp_path: Path, dsn: str) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    site = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    assert (site / "pgpark" / "py.typed").is_file()
    here = Path(psycopg.__file__).parent.parent
    (site / "dependencies.pth").write_text(f"{here}\n")  # the dependencies, but not the editable pgpark
    code = "import pgpark, pgpark.cli, sys; print(pgpark.__file__); sys.exit(pgpark.cli.run(['migrate', '--check']))"
    python = tmp_path / "venv" / "bin" / "python"
    environment = {"PGPARK_DSN": dsn, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "up to date\n"), done.stderr
    assert done.stdout.startswith(str(site)), "it ran from the wheel"
