"""What a worker counts of itself while it works. Plain numbers, cheap to keep; metrics.py shows them to Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

# Up to how many seconds the runs of a bucket took, as pgpark._bounds() in the database; one more has all above.
BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400,
)  # fmt: skip


_FIRST_BEAT_SECS = 10.0


class WorkerMeasures:
    """Each field is written by one thread alone, and read by any.

    claimed, stops: tasks. outcomes: of attempts, as far as this worker knows: completed, failed (also where a retry
    follows) or released. fenced: outcomes that came too late. heartbeats: sent or failed. callbacks: by what
    park_callback_done said. lanes: connections that are up. reconnects: how often one was lost.
    """

    def __init__(self) -> None:
        self.claimed = 0
        self.stops = 0
        self.fenced = 0
        self.outcomes = Counter({"completed": 0, "failed": 0, "released": 0})
        self.heartbeats = Counter({"sent": 0, "failed": 0})
        self.callbacks = Counter({"delivered": 0, "retry": 0, "dead": 0})
        self.lanes: set[int] = set()
        self.reconnects = 0
        self.handler_counts = [0] * (len(BOUNDS) + 1)
        self.handler_secs = 0.0
        self._next_beat_at = time.monotonic() + _FIRST_BEAT_SECS

    def ran(self, secs: float) -> None:
        """A handler ran so long."""
        self.handler_counts[bisect_left(BOUNDS, secs)] += 1
        self.handler_secs += secs

    def beat(self, pause: float | None) -> None:
        """A heartbeat was answered, and the next is due in so many seconds; None: it could not be sent."""
        if pause is None:
            self.heartbeats["failed"] += 1
        else:
            self.heartbeats["sent"] += 1
            self._next_beat_at = time.monotonic() + pause

    def heartbeat_late(self) -> float:
        """For how many seconds a heartbeat should have been answered."""
        return max(time.monotonic() - self._next_beat_at, 0.0)

    def callback(self, result: str) -> None:
        """An attempt to deliver a callback came to this."""
        if result in self.callbacks:
            self.callbacks[result] += 1

    def cumulated(self) -> Mapping[str, int]:
        """How many runs of handlers took at most so long, by the bound as Prometheus writes it."""
        counts = self.handler_counts.copy()
        return {
            bound: sum(counts[: place + 1]) for place, bound in enumerate((*(f"{bound:g}" for bound in BOUNDS), "+Inf"))
        }
