"""absurd: durable tasks, whose state and results are kept. Python (the package absurd-sdk), psycopg.

`absurd` on PyPI is a client by somebody else; absurd-sdk is its authors' own, and absurdctl carries the SQL. The worker
(docs/sdks/python.md of github.com/earendil-works/absurd) takes batch_size tasks in a call, by default as many as it may
run at once, and finishes each by itself. Its threads share one connection, so that tasks which do nothing gain nothing
from them: concurrency is 1. It polls: every 10 ms here, by default 250. Submits: spawn; it has no call that takes many,
so that bulk is 1,000 spawns in a transaction.
"""

from __future__ import annotations

from peers.base import PythonPeer


class Absurd(PythonPeer):
    """Settings: batch, claimed at once; poll_secs, between looks at an empty queue."""

    system = "absurd"
    package = "absurd-sdk"
    program = "run_absurd.py"
    left_sql = "select count(*) from absurd.t_bench where state not in ('completed', 'failed', 'cancelled')"


PEERS = [
    Absurd("absurd, claim 100", batch=100, poll_secs=0.01, tasks=10_000),
    Absurd("absurd, claim 1", batch=1, poll_secs=0.01, single=True, tasks=4000),
]
