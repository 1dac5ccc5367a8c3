-- Whether the accounts of a pool add up: what must be true at each commit, whatever happened before. Only somebody who changed
-- tables by hand, or restored some of them, can have made it untrue. Called by park_doctor; what it advises works out what is
-- wrong when it is run, so that running it late or twice does no harm.
--
-- Each looks at all live tasks or messages of a pool, once.

-- Units in use are those of what runs, places are what the depth leaves, a task belongs to a pool and has no outcome yet.
create or replace function pgpark._wrong_accounts() returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select 'task without pool', format('pool_id %s', t.pool_id), format('%s tasks; there is no such pool', count(*)),
         format('delete from pgpark.task where pool_id = %s;', t.pool_id), false
  from task t
  where not exists (select from pool p where p.pool_id = t.pool_id)
  group by t.pool_id;

  return query
  select 'task with an outcome', p.name,
         format('%s tasks, %s the first, are live although their outcome is in the mailbox', count(*), min(t.task_id)),
         format('select pgpark._forget_tasks(array('
                'select task_id from pgpark.task join pgpark.mailbox using (task_id) where task.pool_id = %s));', p.pool_id),
         false
  from task t
  join mailbox m using (task_id)
  join pool p on p.pool_id = t.pool_id
  group by p.pool_id, p.name;

  return query
  select 'units booked wrongly', p.name,
         string_agg(format('%s booked and %s running for %s', u.booked, u.running, coalesce(quote_literal(u.worker), 'nobody')),
                    ', ' order by u.worker),
         concat_ws(E'\n',
           'insert into pgpark.tally (pool_id, worker, units)',
           'select pool_id, worker, sum(units) from (',
           '  select pool_id, worker, units from pgpark.task where state in (''running'', ''cancelling'')',
           '  union all',
           '  select pool_id, worker, -units from pgpark.tally) booked',
           format('where pool_id = %s group by pool_id, worker having sum(units) <> 0;', p.pool_id),
           format('select pgpark._wake(%L);', p.name)),
         false
  from (
    select b.pool_id, b.worker, sum(b.booked) as booked, sum(b.running) as running
    from (
      select y.pool_id, y.worker, y.units as booked, 0 as running from tally y
      union all
      select t.pool_id, t.worker, 0, t.units from task t where t.state in ('running', 'cancelling')
    ) b
    group by b.pool_id, b.worker
    having sum(b.booked) <> sum(b.running)
  ) u
  join pool p using (pool_id)
  group by p.pool_id, p.name;

  return query
  select 'places booked wrongly', p.name,
         format('%s free and %s waiting, of max_queue_depth %s', s.free, w.waiting, p.max_queue_depth),
         concat_ws(E'\n',
           'do $mend$ begin',
           format('  perform pgpark._lock_entrance(%s, alone => true);', p.door),
           format('  perform pgpark._deal_places(p, pgpark._now()) from pgpark.pool p where p.pool_id = %s;', p.pool_id),
           'end $mend$;'),
         false
  from pool p
  cross join lateral (
    select coalesce(sum(l.free), 0)::int as free from place l where l.pool_id = p.pool_id
  ) s
  cross join lateral (
    select count(*)::int as waiting from task t where t.pool_id = p.pool_id and t.state in ('parked', 'delayed')
  ) w
  where p.max_queue_depth is not null
    and s.free <> p.max_queue_depth - w.waiting;
end
$$;

-- Each waiting task has its message, each message its task. A running task needs its message only when it comes back.
-- Messages are archived, not deleted: they may be somebody's who took the queue for his own.
create or replace function pgpark._stray_messages(lot pgpark.pool) returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  queue constant text := pgpark._messages(lot);
  custom constant boolean := lot.queue_type = 'postgres_custom';
  strays constant text := format(
    'from %s q where %s not exists (select from pgpark.task t where t.pool_id = %s and t.msg_id = q.msg_id)', queue,
    case when custom then 'q.archived_at is null and' else '' end, lot.pool_id);
  bare constant text := format(
    'from pgpark.task t where t.pool_id = %s and t.state in (''parked'', ''delayed'') '
    'and not exists (select from %s q where q.msg_id = t.msg_id%s)', lot.pool_id, queue,
    case when custom then ' and q.archived_at is null' else '' end);
  give_up constant text := format(
    'select pgpark._conclude_all(array(select t.task_id %s order by t.task_id for update), ''dropped'', ''payload lost'');',
    bare);
  found_ bigint;
  first_ bigint;
begin
  if to_regclass(queue) is null then
    return next row('queue missing', lot.name, queue || ' is not there, and with it the payloads of all that waits',
                    concat_ws(E'\n',
                      format('select %s;', case when custom then format('pgpark._create_queue(p) from pgpark.pool p where pool_id = %s',
                                                                        lot.pool_id)
                                                else format('pgmq.%s(%L)', case lot.queue_type when 'in_memory' then 'create_unlogged'
                                                                                               else 'create' end, lot.queue_name) end),
                      format('select setval(pg_get_serial_sequence(%L, ''msg_id''), greatest(max(msg_id), 1)) '
                             'from pgpark.task where pool_id = %s;', queue, lot.pool_id),
                      give_up), false)::pgpark.finding;
    return;
  end if;
  execute 'select count(*), min(q.msg_id) ' || strays into found_, first_;
  if found_ > 0 then
    return next row('message without task', lot.name, format('%s messages, %s the first, in %s', found_, first_, queue),
                    case when custom then format('update %s set archived_at = clock_timestamp() where msg_id in (select q.msg_id %s);',
                                                 queue, strays)
                         else format('select pgmq.archive(%L, array(select q.msg_id %s));', lot.queue_name, strays) end,
                    false)::pgpark.finding;
  end if;
  execute 'select count(*), min(t.task_id) ' || bare into found_, first_;
  if found_ > 0 then
    return next row('task without message', lot.name, format('%s waiting tasks, %s the first', found_, first_), give_up,
                    false)::pgpark.finding;
  end if;
end
$$;

-- Takes live tasks that have their outcome already out of the ledger, with what was booked for them.
create or replace function pgpark._forget_tasks(ids bigint[]) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  forgotten int := 0;
  gone record;  -- from one pool
  lot pgpark.pool;
begin
  for gone in
    with taken as (
      delete from task t where t.task_id = any (ids) returning t.*
    ),
    counted as (
      insert into tally (pool_id, worker, units)
      select t.pool_id, t.worker, -sum(t.units) from taken t where pgpark._runs(t.state) group by t.pool_id, t.worker
    )
    select t.pool_id, array_agg(t.msg_id) as msg_ids, count(*)::int as tasks,
           count(*) filter (where not pgpark._runs(t.state))::int as waited
    from taken t
    group by t.pool_id
  loop
    select p.* into lot from pool p where p.pool_id = gone.pool_id;
    perform pgpark._discard(lot, gone.msg_ids);
    if lot.max_queue_depth is not null then
      perform pgpark._give_places(lot.pool_id, gone.waited);
    end if;
    perform pgpark._wake(lot.name);
    forgotten := forgotten + gone.tasks;
  end loop;
  return forgotten;
end
$$;

-- What should have happened before `overdue` and has not. Most likely nobody runs a worker of the pool, or maintains it.
create or replace function pgpark._overdue(overdue timestamptz) returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select 'timers overdue', p.name,
         format('%s leases lapsed, %s deadlines passed, %s delays over, and nobody has maintained the pool', d.lapsed, d.late,
                d.due),
         -- Beyond what is remembered nobody looks, so that is forgotten where it is wrong.
         case when d.first_lapse < f.next_lapse or d.first_deadline <= f.expired_to or d.first_run <= f.due_to
              then format(E'select pgpark._reset_front(l.pool_id) from pgpark._lock_pool(%L) l;\n', p.name) else '' end
         || case when greatest(d.lapsed, d.late, d.due) <= 1000 then format('select pgpark.park_maintain(%L);', p.name)
                 else format('select pgpark.park_maintain(%L) from generate_series(1, %s);', p.name,
                             greatest(d.lapsed, d.late, d.due) / 1000 + 1) end,
         false
  from (
    select t.pool_id,
           count(*) filter (where pgpark._runs(t.state) and t.lease_until <= overdue) as lapsed,
           count(*) filter (where not pgpark._runs(t.state) and t.deadline <= overdue) as late,
           count(*) filter (where t.state = 'delayed' and t.run_at <= overdue) as due,
           min(t.lease_until) filter (where pgpark._runs(t.state)) as first_lapse,
           min(t.deadline) filter (where not pgpark._runs(t.state)) as first_deadline,
           min(t.run_at) filter (where t.state = 'delayed') as first_run
    from task t
    group by t.pool_id
  ) d
  join pool p using (pool_id)
  join front f using (pool_id)
  where d.lapsed + d.late + d.due > 0
  order by p.name;

  return query
  select 'purge overdue', 'mailbox', format('%s outcomes, of any pool, were kept long enough', count(*)),
         format('select pgpark.park_maintain() from generate_series(1, %s);', count(*) / 1000 + 1), false
  from mailbox m
  where m.purge_at <= overdue - interval '10 minutes'  -- it is done a thousand at a time, and many may fall due at once
  having count(*) > 0;
end
$$;
