"""What bench/horizon.py samples, and what it makes of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from contenders import Contender

SECONDS_BEHIND = 1.0  # of offered tasks: a backlog up to this is none
CLAIM_WINDOW_SECS = 15.0


@dataclass(frozen=True)
class Settings:
    """Times in seconds; rate in tasks per second."""

    rate: float
    held_secs: float
    recovery_secs: float
    interval_secs: float


@dataclass(frozen=True)
class Sample:
    """What was so `at` seconds after the load began. claims, claim_ms: how many so far and what they took together."""

    at: float
    held: bool
    offered: int
    called: int
    claims: int | None
    claim_ms: float | None
    dead_tuples: int
    bytes: int

    @property
    def backlog(self) -> int:
        return max(0, self.offered - self.called)


@dataclass(frozen=True)
class Run:
    """A system in one round."""

    contender: Contender
    settings: Settings
    samples: list[Sample]

    @property
    def held(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.held]

    def last_minute(self) -> list[Sample]:
        """Of the held snapshot."""
        return [sample for sample in self.held if sample.at > self.held[-1].at - 60]

    def done_per_sec(self) -> float:
        """Over the last minute of the held snapshot."""
        last = self.held[-1]
        first = self._before(last.at - 60)
        return (last.called - first.called) / (last.at - first.at)

    def offered_per_sec(self) -> float:
        return self.held[-1].offered / self.held[-1].at

    def backlog(self) -> float:
        """The median of the last minute."""
        return statistics.median(sample.backlog for sample in self.last_minute())

    def claim_ms(self, until: float, window: float = CLAIM_WINDOW_SECS) -> float | None:
        """Mean time of a claim in the window that ends at `until` seconds; None where none was counted."""
        last = max((s for s in self.samples if s.at <= until), key=lambda s: s.at, default=self.samples[0])
        first = self._before(last.at - window)
        if last.claims is None or last.claim_ms is None or last.claims == (first.claims or 0):
            return None
        return (last.claim_ms - (first.claim_ms or 0)) / (last.claims - (first.claims or 0))

    def kept_up(self) -> bool:
        enough = self.offered_per_sec() >= 0.98 * self.settings.rate
        return enough and self.backlog() <= SECONDS_BEHIND * self.settings.rate

    def recovered_after(self) -> float | None:
        """Seconds from the release to the sample that shows it; None: it was not seen to recover."""
        released, interval = self.held[-1].at, self.settings.interval_secs
        first = self.claim_ms(self.samples[0].at, interval)
        for sample in self.samples:
            now = self.claim_ms(sample.at, interval)
            quick = first is None or (now is not None and now <= 2 * first)
            if not sample.held and quick and sample.backlog <= SECONDS_BEHIND * self.settings.rate:
                return sample.at - released
        return None

    def _before(self, at: float) -> Sample:
        """The last sample not later than `at`, or the beginning, where everything was 0."""
        none = replace(self.samples[0], at=0.0, offered=0, called=0, claims=0, claim_ms=0.0)
        return max((s for s in self.samples if s.at <= at), key=lambda s: s.at, default=none)
