"""How long a large mailbox takes to purge, and whether a bite of it stays small.

Run: python bench/purge.py [--messages 1000000] [--dsn DSN]; without a DSN on an embedded server of its own, fsync on.
Outcomes that are due are put into the mailbox (a tenth of them with an idempotency key), then park_maintain is called
until there are none. Printed: all in all, and the median and greatest bite in the first, middle and last tenth.
"""

from __future__ import annotations

import argparse
import statistics
import time

import psycopg
from psycopg.rows import DictRow
from server import chosen_server

from pgpark import calls
from pgpark.database import connect
from pgpark.migrate import migrate

POOL = "pgpark_bench_purge"
FILL = """
insert into pgpark.mailbox (task_id, pool, tenant, user_id, status, payload, priority, units, attempt, submitted_at,
                            created_at, purge_at, pool_id, idempotency_key, storage)
select -g, p.name, 't' || mod(g, 100), 'u' || mod(g, 1000), 'completed', '{"answer": 42}', 1, 1, 1, now(), now(),
       now() - interval '1 day' + g * interval '1 ms', p.pool_id, case when mod(g, 10) = 0 then 'key ' || g end,
       p.mailbox_table
from pgpark.pool p
cross join generate_series(1, %(messages)s::bigint) g
where p.name = %(pool)s
"""
KEYS = """
insert into pgpark.submission_key (pool_id, tenant, idempotency_key, task_id)
select m.pool_id, m.tenant, m.idempotency_key, m.task_id from pgpark.mailbox m
where m.pool = %(pool)s and m.idempotency_key is not null
"""


def purge(connection: psycopg.Connection[DictRow]) -> tuple[int, list[float]]:
    """Purges all that is due; returns how many messages that were, and the seconds of each bite."""
    purged, bites = 0, []
    while True:
        started = time.perf_counter()
        report = calls.run_on(connection, calls.maintain(POOL))
        if not report.purged:
            return purged, bites
        bites.append(time.perf_counter() - started)
        purged += report.purged


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--dsn")
    options = parser.parse_args()
    with chosen_server(options.dsn) as dsn, connect(dsn) as connection:
        migrate(connection)
        calls.run_on(connection, calls.put_pool(POOL, {"max_units": 1, "mailbox": {"ttl_secs": 1}}))
        for statement in (FILL, KEYS):
            connection.execute(statement, {"pool": POOL, "messages": options.messages})
        connection.execute("vacuum analyze pgpark.mailbox, pgpark.submission_key")
        started = time.perf_counter()
        purged, bites = purge(connection)
        print(f"{purged} messages in {len(bites)} bites and {time.perf_counter() - started:.1f} s")
        tenth = max(len(bites) // 10, 1)
        for name, start in (("first", 0), ("middle", len(bites) // 2), ("last", len(bites) - tenth)):
            some = [1000 * secs for secs in bites[start : start + tenth]]
            print(f"{name} tenth: median {statistics.median(some):.1f} ms, greatest {max(some):.1f} ms")
        calls.run_on(connection, calls.drop_pool(POOL, force=True))


if __name__ == "__main__":
    main()
