"""How long a client waits in all, and how long until it looks again though nobody has told it to."""

from __future__ import annotations

import math
import time

from pgpark.models import Maintained

# A notification is a hint that can get lost (a pooler, a failover): look again this often all the same.
BACKSTOP_SECS = 5.0
SHORTEST_PAUSE_SECS = 0.05


class Patience:
    """A wait of `timeout` seconds in all; None: for ever."""

    def __init__(self, timeout: float | None) -> None:
        self._until = math.inf if timeout is None else time.monotonic() + timeout

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._until

    def pause(self, timers: Maintained) -> float:
        """Seconds to wait for a notification: until a timer is due, somebody should look again, or the time is up."""
        due = BACKSTOP_SECS if timers.due_in_secs is None else max(timers.due_in_secs, SHORTEST_PAUSE_SECS)
        return min(due, BACKSTOP_SECS, max(self._until - time.monotonic(), 0))
