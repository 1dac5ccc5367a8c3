"""The accounts of a database: what must add up whenever nobody is at work, whatever happened before. Reads tables,
and calls no function of what it audits. What each task did on the way is the soak's to check (tests/soak)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

# Each finds what should not be: rows of one text.
RULES = {
    "units in use are not those of what runs": """
        select format('pool %s, worker %s: %s booked, %s running', p.name, u.worker, sum(u.booked), sum(u.running))
        from (
          select pool_id, worker, units as booked, 0 as running from pgpark.tally
          union all
          select pool_id, worker, 0, units from pgpark.task where state in ('running', 'cancelling')) u
        join pgpark.pool p using (pool_id)
        group by p.name, u.worker
        having sum(u.booked) <> sum(u.running)""",
    "free places are not what the depth leaves": """
        select format('pool %s: %s free, %s wait, depth %s', p.name, s.free, t.waiting, p.max_queue_depth)
        from pgpark.pool p,
          lateral (select coalesce(sum(free), 0) as free from pgpark.place l where l.pool_id = p.pool_id) s,
          lateral (select count(*) as waiting from pgpark.task t
                   where t.pool_id = p.pool_id and t.state in ('parked', 'delayed')) t
        where p.max_queue_depth is not null and s.free <> p.max_queue_depth - t.waiting""",
    "a task that has an outcome is still there": """
        select format('task %s: %s', t.task_id, t.state)
        from pgpark.task t
        join pgpark.mailbox m using (task_id)""",
    "a task of no pool": """
        select format('task %s: %s', task_id, state)
        from pgpark.task t
        where not exists (select from pgpark.pool p where p.pool_id = t.pool_id)""",
}
# What the audit tells of a task, a letter an event, and what it must have told, in a pool that has had an audit since
# its first task. A claim looks at the clock before it looks at the tasks, so a task that is submitted in between has
# started some moments before.
AUDIT = """
    with told as (
      select a.task_id,
             string_agg(case a.event when 'submitted' then 'S' when 'started' then '(' when 'cancelling' then 'c'
                                     when 'retried' then ')' when 'released' then ')' when 'lost' then ')'
                                     else '.' end, '' order by a.event_id) as story,
             (array_agg(row(a.event, a.reason, a.worker) order by a.event_id desc))[1]::text as last,
             count(*) filter (where a.at < s.at - interval '5 seconds') as early
      from pgpark.audit a
      join pgpark.pool p on p.name = a.pool and p.audit
      join pgpark.audit s on s.task_id = a.task_id and s.event = 'submitted'
      where a.task_id is not null
      group by a.task_id),
    real as (
      select t.task_id, t.attempt, null::text as last,
             case t.state when 'running' then '[(]$' when 'cancelling' then 'c$' else '[S)]$' end as ending
      from pgpark.task t
      join pgpark.pool p on p.pool_id = t.pool_id and p.audit
      union all
      select m.task_id, m.attempt, row(m.status, left(m.reason, 500), m.worker)::text, '[.]$'
      from pgpark.mailbox m
      join pgpark.pool p on p.name = m.pool and p.audit)
    select format('the audit tells of task %s: story %s, last %s; attempt %s, outcome %s',
                  coalesce(t.task_id, r.task_id), t.story, t.last, r.attempt, r.last)
    from told t
    full join real r using (task_id)
    where (t.story ~ '^S([(][)])*([(]c?)?[.]?$') is not true
       or t.early > 0
       or t.story !~ r.ending
       or t.last <> r.last
       or length(translate(t.story, 'Sc.)', '')) <> r.attempt
       or (r.task_id is null and t.story !~ '[.]$')"""
MESSAGES = """
    select format('%%s: message %%s', {pool}, msg_id)
    from {table} q
    where {live} and not exists (
      select from pgpark.task t where t.pool_id = {pool_id} and t.msg_id = q.msg_id)
    union all
    select format('%%s: task %%s', {pool}, task_id)
    from pgpark.task t
    where t.pool_id = {pool_id} and not exists (
      select from {table} q where q.msg_id = t.msg_id and {live})"""


def faults(dsn: str, *, audit: bool = True) -> list[str]:
    """Whatever does not add up, a line each. audit: whether pools that have one have had it since their first task."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = [f"{what}: {line}" for what, query in RULES.items() for (line,) in connection.execute(query.encode())]
        if audit:
            found += [line for (line,) in connection.execute(AUDIT.encode())]
        pools = connection.execute("select pool_id, name, queue_type, queue_name from pgpark.pool").fetchall()
        for pool_id, name, kind, queue in pools:
            custom = kind == "postgres_custom"
            query = sql.SQL(MESSAGES).format(
                pool=sql.Literal(name),
                pool_id=sql.Literal(pool_id),
                table=sql.Identifier("pgpark", queue) if custom else sql.Identifier("pgmq", f"q_{queue}"),
                live=sql.SQL("archived_at is null" if custom else "true"),
            )
            found += [f"a message without its task, or a task without: {line}" for (line,) in connection.execute(query)]
    return found


def outcomes(dsn: str, accepted: Iterable[int]) -> dict[str, int]:
    """How many of these tasks, all of which have ended, have which outcome; none of them was fetched. Fails for one
    that has none, or more, and for one that nobody submitted."""
    wanted = set(accepted)
    counts: dict[str, int] = {}
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        rows: list[dict[str, Any]] = connection.execute("select task_id, status from pgpark.mailbox").fetchall()
        live = connection.execute("select task_id, state from pgpark.task").fetchall()
    ids = [row["task_id"] for row in rows]
    assert not live, f"{len(live)} tasks have not ended: {live[:5]}"
    assert len(ids) == len(set(ids)), "a task has two outcomes"
    assert not wanted - set(ids), f"without an outcome: {sorted(wanted - set(ids))[:5]}"
    assert not set(ids) - wanted, f"never accepted: {sorted(set(ids) - wanted)[:5]}"
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return counts
