"""How long a client waits in all, and how long until it looks again though nobody has told it to."""

from __future__ import annotations

import math
import time

from pgpark.models import Maintained

# A notification is a hint that can get lost (a pooler, a failover): look again this often all the same.
BACKSTOP_SECS = 5.0
POLL_SECS = 1.0  # where notifications cannot be heard
SHORTEST_PAUSE_SECS = 0.05


def between_looks(poll: bool) -> float:
    """Seconds between looks that nobody asked for. poll: of those who hear no notification."""
    return POLL_SECS if poll else BACKSTOP_SECS


class Patience:
    """A wait of `timeout` seconds in all; None: for ever."""

    def __init__(self, timeout: float | None, poll: bool = False) -> None:
        self._until = math.inf if timeout is None else time.monotonic() + timeout
        self._longest_pause = between_looks(poll)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._until

    def pause(self, timers: Maintained) -> float:
        """Seconds to wait for a notification: until a timer is due, somebody should look again, or the time is up."""
        due = self._longest_pause if timers.due_in_secs is None else max(timers.due_in_secs, SHORTEST_PAUSE_SECS)
        return min(due, self._longest_pause, max(self._until - time.monotonic(), 0))
