"""DBOS queues: durable workflows, taken from a queue by polling; results are kept. Python, SQLAlchemy with psycopg.

Its documents (https://docs.dbos.dev/python/reference/queues) give two settings that matter here: the limit on workflows
at once, and polling_interval_sec, by default one second. The fast form runs up to 1,000 at once and polls after 10 ms;
handlers are async, so that they need no thread each. Submits: DBOSClient.enqueue, and for bulk
DBOSClient.enqueue_in_transaction, 1,000 to a transaction, since it has no call that takes many. With concurrency 1 it
takes a task at a poll, and polls 1 ms after the one before.
"""

from __future__ import annotations

from peers.base import PythonPeer


class Dbos(PythonPeer):
    """Settings: concurrency, workflows at once; poll_secs, between looks at the queue; connections, of the pool."""

    system = "dbos"
    package = "dbos"
    program = "run_dbos.py"
    left_sql = "select count(*) from dbos.workflow_status where status in ('ENQUEUED', 'PENDING', 'DELAYED')"


PEERS = [
    Dbos("DBOS queue, 1,000 at once", concurrency=1000, poll_secs=0.01, connections=20, threads=16, tasks=4000),
    Dbos("DBOS queue, 1 at once", concurrency=1, poll_secs=0.001, connections=2, threads=1, single=True, tasks=400),
]
