"""When a worker looks after the timers of its pool: neither while it is busy all the time, nor late."""

from __future__ import annotations

import math
import time

_SETTLE_SECS = 0.05
_LONGEST_UNTENDED_SECS = 1.0


class Clock:
    """A busy worker does what is due in its pool with each claim, so it looks after the timers only once nothing has
    happened for 50 ms, or a second has passed. Then it knows when the next is due.

    poll_secs: look this often all the same. Times are those of `time.monotonic`, which is the event loop's clock too.
    """

    def __init__(self, poll_secs: float) -> None:
        self._poll_secs = poll_secs
        self._changed_at = self._looked_at = -math.inf
        self._due_at = 0.0  # as the last look said
        self.look_at = 0.0

    def look_by(self, when: float) -> bool:
        """Look no later than that; returns whether that is earlier than before."""
        if when >= self.look_at:
            return False
        self.look_at = when
        return True

    def changed(self) -> bool:
        """Something has happened that may have moved timers; returns whether the next look is earlier than before."""
        self._changed_at = time.monotonic()
        return self.look_by(self._changed_at + _SETTLE_SECS)

    def time_to_look(self) -> bool:
        """Whether to look now; else `look_at` says when."""
        now = time.monotonic()
        if now < self.look_at:
            return False
        quiet_at = min(self._changed_at + _SETTLE_SECS, self._looked_at + _LONGEST_UNTENDED_SECS)
        if now >= min(quiet_at, self._due_at):
            return True
        self.look_at = min(quiet_at, self._due_at)
        return False

    def overslept(self) -> bool:
        """Whether what the last look foretold is due."""
        return time.monotonic() >= self._due_at

    def looking(self) -> None:
        """A look begins; what changes from here on needs another."""
        self._looked_at = time.monotonic()
        self.look_at = self._due_at = math.inf

    def looked(self, due_in_secs: float | None) -> None:
        """A look has said when the next timer is due; 0: at once, None: there is none."""
        secs = self._poll_secs
        if due_in_secs is not None:
            secs = min(secs, max(due_in_secs, _SETTLE_SECS) if due_in_secs else 0)
        self._due_at = time.monotonic() + secs
        self.look_by(self._due_at)
