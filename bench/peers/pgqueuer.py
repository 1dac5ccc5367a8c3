"""pgqueuer: jobs in one table, deleted and logged when they have ended; results are not kept. Python, asyncpg, uvloop.

Its guide (docs/guides/performance-tuning.md of github.com/janbjorge/pgqueuer) says: a larger batch_size for short jobs,
the settings of `pgq autovac`, and a direct asyncpg connection for the manager; its page on benchmarks finds asyncpg
nearly twice as fast as psycopg. All are done here. Durability stays at its default, `durable`. Submits:
Queries.enqueue, with lists of 1,000 in bulk. Batch is the batch_size of run(); what has ended is written in batches of
the same size, or after 0.1 s. Batch 1 is as near to one at a time as it comes: it goes on while the last completion
is being written.
"""

from __future__ import annotations

from peers.base import PythonPeer


class Pgqueuer(PythonPeer):
    """Settings: batch."""

    system = "pgqueuer"
    package = "pgqueuer"
    program = "run_pgqueuer.py"
    left_sql = "select count(*) from pgqueuer"


PEERS = [
    Pgqueuer("pgqueuer, batch 100", batch=100),
    Pgqueuer("pgqueuer, batch 10", batch=10),
    Pgqueuer("pgqueuer, batch 1", batch=1, single=True, tasks=10_000),
]
