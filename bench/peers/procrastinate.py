"""procrastinate: a job is fetched and finished by a function call each; results are not kept. Python, psycopg.

It has no batches on the worker's side; its documents offer `concurrency`, and deleting jobs that have ended
(https://procrastinate.readthedocs.io, "Launch a worker", "Delete finished jobs"): delete_jobs is `always` here, so that
the table does not grow. Submits: Task.defer_async, and Task.batch_defer_async, which its docstring calls more
efficient, with 1,000 jobs a call. Connections: as many as concurrency, and one for LISTEN.
"""

from __future__ import annotations

from peers.base import PythonPeer


class Procrastinate(PythonPeer):
    """Settings: concurrency, jobs at once; connections, of the pool."""

    system = "procrastinate"
    package = "procrastinate"
    program = "run_procrastinate.py"
    left_sql = "select count(*) from procrastinate_jobs where status in ('todo', 'doing')"


PEERS = [
    Procrastinate("procrastinate, concurrency 20", concurrency=20, connections=20, tasks=4000),
    Procrastinate("procrastinate, concurrency 1", concurrency=1, connections=1, single=True, tasks=2000),
]
