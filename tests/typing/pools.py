"""What type checkers see of pools; checked by a test, never run."""

from collections.abc import Coroutine
from typing import Any

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import assert_type

from pgpark import AsyncPool, Message, Pool, build_pools, build_pools_async
from pgpark.models import PoolStats, Submitted, TaskStatus


class Prompt(BaseModel):
    text: str


class Answer(BaseModel):
    text: str


def sync(session: Session) -> None:
    pools = build_pools("scheduler-config.json")
    pool = pools["gpu"]
    assert_type(pool, Pool)
    assert_type(pool.submit({"x": 1}, units=2, priority="high"), Submitted)
    assert_type(pool.submit_many([{"payload": 1}]), list[Submitted])
    assert_type(pool.cancel(1, reason="enough"), str)
    assert_type(pool.status(1), TaskStatus | None)
    assert_type(pool.stats(), PoolStats)
    assert_type(pool.on(session).submit(1), Submitted)
    message = pool.result(1, timeout=5)
    assert message is not None and message.payload["text"]
    typed = pool.typed(Prompt, Answer)
    assert_type(typed, Pool[Prompt, Answer | None])
    assert_type(typed.submit(Prompt(text="hi"), tenant="t"), Submitted)
    assert_type(typed.result(1), Message[Answer | None] | None)
    assert_type(typed.fetch("t", max_messages=5), list[Message[Answer | None]])
    pool.submit(1, unit=2)  # type: ignore[call-arg]
    pool.submit(1, units="2")  # type: ignore[arg-type]
    pool.cancel("1")  # type: ignore[arg-type]
    typed.submit(5)  # type: ignore[arg-type]


async def asynchronous(session: AsyncSession) -> None:
    async with build_pools_async("scheduler-config.json") as pools:
        pool = pools["gpu"]
        assert_type(pool, AsyncPool)
        later = assert_type(pool.submit({"x": 1}, units=2), Coroutine[Any, Any, Submitted])
        assert_type(await later, Submitted)
        assert_type(await pool.on(session).submit(1), Submitted)
        assert_type(await pool.cancel(1), str)
        typed = pool.typed(Prompt, Answer)
        assert_type(await typed.fetch("t"), list[Message[Answer | None]])
        assert_type(await typed.result(1), Message[Answer | None] | None)
        await pool.submit(1, unit=2)  # type: ignore[call-arg]
