"""pg-boss: jobs are fetched and completed in batches; completed ones stay in the table for days. Node, pg.

Its documents (docs/api/workers.md of github.com/timgit/pg-boss, and the options' own comments) give batchSize, and
burstWhenBatchFull, which fetches on without a pause while batches come full; a queue with `notify` wakes its workers.
One at a time: fetch and complete in a loop, looking every 10 ms when there is nothing, since work() with a batch of 1
waits half a second between jobs. Submits: send, and insert with 1,000 jobs a call. Batches store no results.

12.35.0 is the newest whose dependencies could be had when this was written. It needs Node 22.12, which comes as the npm
package `node`.
"""

from __future__ import annotations

from peers.base import NodePeer


class PgBoss(NodePeer):
    """Settings: batch; connections, of the pool."""

    system = "pg_boss"
    package = "pg-boss"
    program = "run_pg_boss.mjs"
    left_sql = "select count(*) from pgboss.job where name = 'bench' and state < 'completed'"


PEERS = [
    PgBoss("pg-boss, batch 500", batch=500, connections=10, tasks=20_000),
    PgBoss("pg-boss, batch 100", batch=100, connections=10, tasks=20_000),
    PgBoss("pg-boss, fetch 1, complete 1", batch=1, connections=1, single=True, tasks=4000),
]
