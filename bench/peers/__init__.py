"""One module per system that the benches compare; peers/base.py says what each offers."""

from __future__ import annotations

from importlib import import_module

from peers.base import Peer

SYSTEMS = ("pgpark", "pgmq", "pgqueuer", "procrastinate", "dbos", "absurd", "graphile_worker", "pg_boss")


def peers(*systems: str) -> list[Peer]:
    """Every form of these systems, or of all."""
    return [peer for system in systems or SYSTEMS for peer in import_module(f"peers.{system}").PEERS]
