"""How long the audit takes to answer when it is large, and to lose a day.

Run: python bench/audit.py [--events 10000000] [--days 30] [--dsn DSN]; without a DSN on an embedded server of its own.
Events of 20 pools and 1000 tenants are written into the days before today, four to a task, one task in a hundred
failed. Then each way to ask is asked `--rounds` times for something else: first in a session of its own, which has yet
to read the catalogs and, mostly, those pages; then again. Printed: medians and the greatest, in milliseconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.rows import DictRow
from server import chosen_server, new_database

from pgpark import calls
from pgpark.database import connect
from pgpark.migrate import migrate

POOLS, TENANTS = 20, 1000
FILL = """
insert into pgpark.{table} (at, event, pool, task_id, attempt, worker, tenant, priority, units, reason)
select %(day)s::timestamptz + (n * 86400.0 / %(events)s) * interval '1 second',
       case n %% 4 when 0 then 'submitted' when 1 then 'started' when 2 then 'started'
                   else case when n / 4 %% 97 = 0 then 'failed' else 'completed' end end,
       'pool_' || n / 4 %% %(pools)s, %(first)s + n / 4, 1, 'worker-' || n %% 40,
       'tenant ' || (power((n / 4 * 7919 %% 100000) / 100000.0, 3) * %(tenants)s)::int,
       1, 1 + n / 4 %% 16, case when n %% 4 = 3 and n / 4 %% 97 = 0 then 'RuntimeError: out of memory' end
from generate_series(0, %(events)s - 1) n
"""

Ask = Callable[[random.Random], dict[str, Any]]


def ways(begin: datetime, days: int, tasks: int) -> dict[str, Ask]:
    """Each way to ask: random arguments of park_audit."""

    def day(dice: random.Random) -> datetime:
        return begin + timedelta(days=dice.randrange(days), hours=dice.randrange(20))

    def pool(dice: random.Random) -> str:
        return f"pool_{dice.randrange(POOLS)}"

    def period(dice: random.Random, hours: int) -> dict[str, Any]:
        since = day(dice)
        return {"since": since, "until": since + timedelta(hours=hours)}

    return {
        "a task": lambda dice: {"task_id": dice.randrange(tasks)},
        "a tenant, its last 100": lambda dice: {"tenant": f"tenant {dice.randrange(TENANTS)}"},
        "a tenant that has none": lambda dice: {"tenant": f"nobody {dice.random()}"},
        "a tenant, three hours": lambda dice: {"tenant": f"tenant {dice.randrange(TENANTS)}", **period(dice, 3)},
        "a pool, its last 100": lambda dice: {"pool": pool(dice)},
        "a pool, three hours": lambda dice: {"pool": pool(dice), **period(dice, 3)},
        "a pool, 1000 of three hours": lambda dice: {"pool": pool(dice), **period(dice, 3), "max_events": 1000},
        "a pool, its last 100 failures": lambda dice: {"pool": pool(dice), "event": "failed"},
        "a pool, expired: there are none": lambda dice: {"pool": pool(dice), "event": "expired"},
        "all, three hours": lambda dice: period(dice, 3),
    }


def fill(connection: psycopg.Connection[DictRow], begin: datetime, days: int, events: int) -> None:
    connection.execute("select pgpark._add_audit_days(%s, %s)", [begin, days])
    for number in range(days):
        day = begin + timedelta(days=number)
        a_day = events // days
        table = connection.execute("select pgpark._audit_table(%s) as name", [day]).fetchone()
        assert table is not None
        named = {"day": day, "events": a_day, "first": number * a_day // 4, "pools": POOLS, "tenants": TENANTS - 1}
        connection.execute(FILL.format(table=table["name"]).encode(), named)
        connection.execute(f"vacuum (analyze) pgpark.{table['name']}".encode())


def timed(connection: psycopg.Connection[DictRow], arguments: dict[str, Any]) -> tuple[float, int]:
    started = time.perf_counter()
    rows = calls.run_on(connection, calls.audit(**arguments))
    return 1000 * (time.perf_counter() - started), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dsn")
    options = parser.parse_args()
    dice = random.Random(1)
    with chosen_server(options.dsn) as server, new_database(server) as dsn, connect(dsn) as connection:
        migrate(connection)
        connection.execute("set synchronous_commit = off")
        calls.run_on(connection, calls.put_pool("pool_0", {"max_units": 1, "audit": True, "audit_days": options.days}))
        row = connection.execute("select pgpark._audit_day(pgpark._now()) as today").fetchone()
        assert row is not None
        begin = row["today"] - timedelta(days=options.days)
        started = time.perf_counter()
        fill(connection, begin, options.days, options.events)
        (row,) = connection.execute(
            "select sum(pg_total_relation_size(inhrelid))::float8 / 1e9 as gb, version() from pg_inherits"
            " where inhparent = 'pgpark.audit'::regclass"
        ).fetchall()
        version = " ".join(row["version"].split()[:2])
        print(f"{options.events} events on {options.days} days, {row['gb']:.1f} GB, {version}")
        print(f"written in {time.perf_counter() - started:.0f} s\n")
        print("| asked for | rows | first: median | greatest | again: median |")
        print("|---|---:|---:|---:|---:|")
        for name, ask in ways(begin, options.days, options.events // 4).items():
            first, again, rows = [], [], 0
            for _ in range(options.rounds):
                arguments = ask(dice)
                with connect(dsn) as fresh:
                    secs, rows = timed(fresh, arguments)
                    first.append(secs)
                    again.append(timed(fresh, arguments)[0])
            cells = (statistics.median(first), max(first), statistics.median(again))
            print(f"| {name} | {rows} | " + " | ".join(f"{cell:.1f} ms" for cell in cells) + " |", flush=True)
        drop_a_day(connection, options.days)


def drop_a_day(connection: psycopg.Connection[DictRow], days: int) -> None:
    calls.run_on(connection, calls.put_pool("pool_0", {"max_units": 1, "audit": True, "audit_days": days - 1}))
    connection.execute("update pgpark.audit_upkeep set next_look = 'epoch'")
    started = time.perf_counter()
    calls.run_on(connection, calls.maintain("pool_0"))
    secs = time.perf_counter() - started
    (row,) = connection.execute("select count(*) as days from pgpark._audit_days_before(pgpark._now())").fetchall()
    print(f"\n{days - row['days']} day of {days} dropped in {1000 * secs:.0f} ms")


if __name__ == "__main__":
    main()
