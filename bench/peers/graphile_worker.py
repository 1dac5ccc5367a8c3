"""graphile-worker: jobs are locked, and deleted when they have ended; results are not kept. Node, pg.

With the local queue: the settings under "Quick stats" of its page on performance
(https://worker.graphile.org/docs/performance): 24 jobs at once on 25 connections, a local queue of 500, and completions
in batches without delay. Without it: the settings of the same page's run "without batching". One at a time: one job at
once, no batching, and the two connections that it needs at least (one listens). Submits: addJob, and addJobs with 1,000
jobs a call. It waits on LISTEN.
"""

from __future__ import annotations

from peers.base import NodePeer


class GraphileWorker(NodePeer):
    """Settings: concurrency, jobs at once; connections, of the pool; local_queue, jobs locked ahead (-1: none);
    batch_delay, milliseconds that completions wait for others (-1: each by itself)."""

    system = "graphile_worker"
    package = "graphile-worker"
    program = "run_graphile_worker.mjs"
    left_sql = "select count(*) from graphile_worker._private_jobs"


PEERS = [
    GraphileWorker("graphile-worker, local queue", concurrency=24, connections=25, local_queue=500, batch_delay=0),
    GraphileWorker(
        "graphile-worker, without", concurrency=24, connections=25, local_queue=-1, batch_delay=-1, tasks=20_000
    ),
    GraphileWorker(
        "graphile-worker, 1 at once",
        concurrency=1,
        connections=2,
        local_queue=-1,
        batch_delay=-1,
        single=True,
        tasks=4000,
    ),
]
