"""Following many tasks at once: their parts as they come, then the outcome. However many clients stream, one query
reads for all of them what is new, and one connection waits for their outcomes (`AsyncPool.result`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from psycopg import sql

from pgpark import AsyncPool, Message, Part
from pgpark.calls import Call

_GATHER_SECS = 0.02  # that a look waits for others to come along
_SHORTEST_SECS, _LONGEST_SECS = 0.03, 0.25  # between two looks at a task: the longer, the less there was
_PAGE = 1000  # parts of one task in one look

_Look = tuple[int, int, "asyncio.Future[list[Part]]"]


class Follower:
    """Reads the parts of the tasks of one pool for all who follow them."""

    def __init__(self, pool: AsyncPool) -> None:
        self._pool = pool
        self._asked: list[_Look] = []
        self._looking: set[asyncio.Task[None]] = set()

    async def follow(self, task_id: int) -> AsyncIterator[Part | Message]:
        """What the task has emitted and what it emits, then its outcome. Never ends for a task that is not known.
        Raises the errors of pgpark."""
        outcome = asyncio.ensure_future(self._pool.result(task_id))
        after, pause = 0, _SHORTEST_SECS
        try:
            while True:
                ended = outcome.done()  # before looking: what it emitted was written before it ended
                parts = await self._parts(task_id, after)
                for part in parts:
                    after = part.number
                    yield part
                if ended and len(parts) < _PAGE:
                    break
                pause = _SHORTEST_SECS if parts else min(pause * 1.5, _LONGEST_SECS)
                await asyncio.wait({outcome}, timeout=pause)
            message = outcome.result()
            assert message is not None  # it waits without a limit
            yield message
        finally:
            outcome.cancel()

    async def _parts(self, task_id: int, after: int) -> list[Part]:
        """Parts with a higher number; read together with what others ask for."""
        answer: asyncio.Future[list[Part]] = asyncio.get_running_loop().create_future()
        self._asked.append((task_id, after, answer))
        if len(self._asked) == 1:
            look = asyncio.ensure_future(self._look())
            self._looking.add(look)
            look.add_done_callback(self._looking.discard)
        return await answer

    async def _look(self) -> None:
        await asyncio.sleep(_GATHER_SECS)
        asked, self._asked = self._asked, []
        try:
            rows = await self._pool.run(_parts_of([(task_id, after) for task_id, after, _ in asked]))
        except Exception as error:
            for *_, answer in asked:
                if not answer.done():
                    answer.set_exception(error)
            return
        for place, (*_, answer) in enumerate(asked):
            if not answer.done():
                answer.set_result(rows.get(place, []))


def _parts_of(places: list[tuple[int, int]]) -> Call[dict[int, list[Part]]]:
    """park_parts for many tasks: by place in the list."""
    statement = sql.SQL(
        "select w.place, p.* from unnest(%(task_ids)s::bigint[], %(afters)s::int[]) with ordinality"
        " as w (task_id, after, place) cross join lateral pgpark.park_parts(w.task_id, w.after, %(page)s) p"
    ).format()
    task_ids, afters = ([list(column) for column in zip(*places, strict=True)]) if places else ([], [])

    def read(rows: list[dict[str, object]]) -> dict[int, list[Part]]:
        found: dict[int, list[Part]] = {}
        for row in rows:
            found.setdefault(int(str(row["place"])) - 1, []).append(Part.model_validate(row))
        return found

    return Call(statement, {"task_ids": task_ids, "afters": afters, "page": _PAGE}, read)
