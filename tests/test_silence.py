"""A server that does not answer: who waits for it is cut off. A proxy that hangs: tests/chaos/test_network.py."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from psycopg import sql

from pgpark import calls, silence
from pgpark.database import connect, connect_async
from pgpark.errors import DatabaseError

SLEEPS = calls.Call[Any](sql.SQL("select pg_sleep(60)").format(), {}, list)
ANSWERS = calls.Call[Any](sql.SQL("select 1 as one").format(), {}, list)

CUT = r"server closed the connection|consuming input failed"


@pytest.mark.parametrize(
    ("dsn", "secs"), [("host=h", 60), ("host=h tcp_user_timeout=1500", 1.5), ("host=h tcp_user_timeout=0", None)]
)
def test_the_dsn_says_how_long_a_server_may_take(dsn: str, secs: float | None) -> None:
    assert silence.longest(dsn) == secs


def test_a_call_without_an_answer_ends_as_a_lost_connection(dsn: str) -> None:
    async def main() -> None:
        async with await connect_async(dsn) as connection:
            assert await silence.run_on_async(connection, ANSWERS, 5) == [{"one": 1}]
            with pytest.raises(DatabaseError, match=CUT):
                await silence.run_on_async(connection, SLEEPS, 0.2)

    asyncio.run(asyncio.wait_for(main(), 30))
    began = time.monotonic()
    with connect(dsn) as connection:
        assert silence.run_on(connection, ANSWERS, 5) == [{"one": 1}]
        with pytest.raises(DatabaseError, match=CUT):
            silence.run_on(connection, SLEEPS, 0.2)
    assert time.monotonic() - began < 30


def test_an_answer_that_is_there_is_read_though_the_loop_was_held_up(dsn: str) -> None:
    async def main() -> None:
        async with await connect_async(dsn) as connection:
            answer = asyncio.create_task(silence.run_on_async(connection, ANSWERS, 0.2))
            await asyncio.sleep(0)
            time.sleep(1)
            assert await answer == [{"one": 1}]
            assert await silence.run_on_async(connection, ANSWERS, 5) == [{"one": 1}], "the connection is kept"

    asyncio.run(main())


def test_a_value_that_libpq_will_refuse_is_left_to_it() -> None:
    assert silence.longest("host=h tcp_user_timeout=abc") is None
    assert silence.longest("host=h tcp_user_timeout=-5") is None
    with pytest.raises(DatabaseError, match="the DSN cannot be read"):
        silence.longest("postgresql://u:pass word@h")


def test_the_server_gives_up_before_its_client_does_unless_it_would_even_earlier(dsn: str) -> None:
    async def limit(before: str) -> str:
        async with await connect_async(dsn) as connection:
            await connection.execute(f"set statement_timeout = {before}".encode())
            await silence.bound_server_async(connection, 60)
            ((row),) = await (await connection.execute("show statement_timeout")).fetchall()
            return str(row["statement_timeout"])

    assert [asyncio.run(limit(before)) for before in ("0", "'10s'", "'2min'")] == ["48s", "10s", "48s"]
