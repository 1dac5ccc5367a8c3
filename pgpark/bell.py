"""Wakes the two lanes of a worker: the first where it sleeps, else the second where that may help."""

from __future__ import annotations

import asyncio

FIRST, SECOND = 0, 1


class Bell:
    """Who finds nothing to do sleeps here. Between looking and sleeping nothing may be awaited, so no ring is missed.

    second_helps: whether the second lane answers too when the first is busy.
    """

    def __init__(self, second_helps: bool) -> None:
        self._answering = (FIRST, SECOND) if second_helps else (FIRST,)
        self._asleep: dict[int, asyncio.Future[None]] = {}

    def ring(self) -> None:
        """There is something to do: for one lane, which rings again if there is more than it takes."""
        for lane in self._answering:
            if lane in self._asleep:  # or is waking up already
                return self.wake(lane)
        return None

    def wake(self, lane: int) -> None:
        """Wakes this lane."""
        _settle(self._asleep.get(lane))

    def wake_all(self) -> None:
        """Wakes both."""
        for sleeper in self._asleep.values():
            _settle(sleeper)

    async def sleep(self, lane: int, until: float | None = None) -> None:
        """Until somebody rings for this lane, or the time of the loop's clock."""
        loop = asyncio.get_running_loop()
        sleeper = self._asleep[lane] = loop.create_future()
        alarm = None if until is None else loop.call_at(until, _settle, sleeper)
        try:
            await sleeper
        finally:
            del self._asleep[lane]
            if alarm is not None:
                alarm.cancel()


def _settle(sleeper: asyncio.Future[None] | None) -> None:
    if sleeper is not None and not sleeper.done():
        sleeper.set_result(None)
