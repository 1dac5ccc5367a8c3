"""What a soak does: the pools and their settings, the workers, how much of it. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

LARGEST = 16  # units of a task; every worker can hold one
TENANTS = ["a", "b", "c", "d", None]
LONGEST_WAIT_SECS = 30  # without an admission, or at the end without an outcome: then something hangs


@dataclass(frozen=True)
class Plan:
    """How much is done.

    units: the capacity of a pool. waiting: about how many tasks wait in a pool. held_open: the part of all calls
    whose transaction is held open for up to 20 ms.
    """

    admissions: int = 500_000
    connections: int = 16
    processes: int = 4
    seed: int = 1
    units: int = 4_000
    waiting: int = 2_000
    held_open: float = 0.02

    def pools(self) -> dict[str, Config]:
        """Each pool's config to begin and to end with."""
        retry = {"max_attempts": 2, "max_losses": 2, "backoff_secs": 0.5}
        common: Config = {"lease_secs": 1, "retry": retry}
        limits = {"a": {"weight": 3}, "b": {"max_units": self.units // 10}, "": {"max_units": self.units // 4}}
        depth = {"max_queue_depth": self.waiting * 3 // 4, "overflow": "drop_lowest"}
        memory = {"queue": {"type": "in_memory"}}
        return {
            "strict": common | {"max_units": self.units, "archive": True, "run_timeout_secs": 4},
            "capped": common | depth | {"max_units": self.units // 2, "max_bypass": 8, "audit": True},
            "share": common
            | memory
            | {"max_units": self.units, "max_bypass": 2, "fairness": "tenant", "tenants": limits},
        }

    def workers(self) -> dict[str, int]:
        """Each worker's own capacity in units. There are fewer than connections: some workers have two of them."""
        count = max(1, self.connections * 3 // 4)
        return {f"w{n}": LARGEST + self.units // 16 + n * self.units // 64 for n in range(count)}

    def worker(self, connection: int) -> str:
        return f"w{connection % len(self.workers())}"
