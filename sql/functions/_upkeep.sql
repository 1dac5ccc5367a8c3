-- Whether the server looks after the tables of pgpark and its queues: pgmq, indexes, vacuum, and what keeps it from its work.
-- Called by park_doctor. Reads catalogs and statistics, no table of tasks. Times here are the server's own.

-- What `pgpark migrate` asks for too.
create or replace function pgpark._required_pgmq() returns text
language sql immutable
as $$
  select '1.5.0';
$$;

-- installed, offered: versions of the extension; null: from plain SQL, none.
create or replace function pgpark._wrong_pgmq(installed text, offered text) returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  required constant text := pgpark._required_pgmq();
begin
  if to_regprocedure('pgmq.create(text)') is null then
    return next row('pgmq missing', 'pgmq', 'there is no pgmq in this database, and the payloads were in it; what is left of '
                    'them is in a backup. To install it: pgpark migrate', null, false)::pgpark.finding;
    return;
  elsif string_to_array(substring(installed from '^[0-9.]*[0-9]'), '.')::int[] < string_to_array(required, '.')::int[]
        or to_regprocedure('pgmq.send_batch(text,jsonb[],jsonb[],timestamp with time zone)') is null
        or to_regprocedure('pgmq.archive(text,bigint[])') is null then
    return next row('pgmq too old', 'pgmq', format('pgpark needs %s or newer, this is %s', required,
                                                   coalesce(installed, 'older, from plain SQL')),
                    case when installed is not null then 'alter extension pgmq update;' end, false)::pgpark.finding;
  elsif installed <> offered then
    return next row('pgmq update available', 'pgmq', format('the server offers %s, this is %s', offered, installed),
                    'alter extension pgmq update;', false)::pgpark.finding;
  end if;
  return query
  select 'queue missing', 'pgmq.q_' || q.name, 'callbacks are kept in it', format('select pgmq.create(%L);', q.name), false
  from (values ('pgpark_outbox'), ('pgpark_dead_letters')) as q (name)
  where to_regclass('pgmq.q_' || q.name) is null;
end
$$;

-- An index that is being made is not valid yet. One that `reindex concurrently` left behind when it failed is dropped.
create or replace function pgpark._invalid_indexes() returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select 'index invalid', i.name, 'it is written but not read',
         case when c.relname ~ '_cc(new|old)[0-9]*$' then format('drop index concurrently %s;', i.name)
              else format('reindex index concurrently %s;', i.name) end, false
  from pg_index x
  join pg_class c on c.oid = x.indexrelid and c.relkind = 'i'
  join pg_namespace n on n.oid = c.relnamespace and n.nspname in ('pgpark', 'pgmq')
  cross join lateral (select format('%I.%I', n.nspname, c.relname) as name) i
  where not x.indisvalid
    and not exists (select from pg_stat_progress_create_index g where g.index_relid = c.oid)
  order by i.name;
end
$$;

-- Tables that autovacuum passes over, and such as have many times the dead rows at which it should have come, and no vacuum
-- in the last ten minutes.
create or replace function pgpark._vacuum_lag() returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select 'autovacuum off', s.name, 'no table is vacuumed unless somebody does it',
         format(E'alter system set %s = on;\nselect pg_reload_conf();', s.name), false
  from (values ('autovacuum'), ('track_counts')) as s (name)
  where not current_setting(s.name)::boolean;

  return query
  with kept as (
    select format('%I.%I', s.schemaname, s.relname) as name, s.n_dead_tup, greatest(s.last_vacuum, s.last_autovacuum) as vacuumed,
           coalesce((o.settings ->> 'autovacuum_enabled')::boolean, true) as enabled,
           coalesce(o.settings ->> 'autovacuum_vacuum_threshold',
                    current_setting('autovacuum_vacuum_threshold'))::double precision
           + coalesce(o.settings ->> 'autovacuum_vacuum_scale_factor',
                      current_setting('autovacuum_vacuum_scale_factor'))::double precision
             * greatest(c.reltuples, 0) as threshold
    from pg_stat_user_tables s
    join pg_class c on c.oid = s.relid
    cross join lateral (
      select coalesce(jsonb_object_agg(option_name, option_value), '{}') as settings from pg_options_to_table(c.reloptions)
    ) o
    where s.schemaname = 'pgpark'
       or (s.schemaname = 'pgmq'
           and (s.relname in ('q_pgpark_outbox', 'q_pgpark_dead_letters')
                or s.relname in (select k.kind || p.queue_name
                                 from pool p, (values ('q_'), ('a_')) as k (kind)
                                 where p.queue_type <> 'postgres_custom')))
  )
  select 'autovacuum off', k.name, 'for this table', format('alter table %s reset (autovacuum_enabled);', k.name), false
  from kept k
  where not k.enabled
  union all
  select 'vacuum overdue', k.name,
         format('%s dead rows; autovacuum should begin at %s; last vacuum: %s', k.n_dead_tup, round(k.threshold),
                coalesce(k.vacuumed::text, 'never')),
         format('vacuum (analyze) %s;', k.name), false
  from kept k
  where k.n_dead_tup > greatest(20 * k.threshold, 100000)
    and (k.vacuumed > clock_timestamp() - interval '10 minutes') is not true
  order by 1, 2;
end
$$;

-- What keeps vacuum from taking dead rows: sessions and prepared transactions of this database that are older than `age`, and
-- replication slots that hold more than so many transactions back. Sessions of others are seen only by superusers and
-- members of pg_read_all_stats. What they run is not told: there may be payloads in it.
create or replace function pgpark._held_horizon(age interval, transactions bigint) returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  since constant timestamptz := clock_timestamp() - _held_horizon.age;
begin
  return query
  select 'transaction held open', 'pid ' || a.pid,
         format('%s, of %s, application %s: since %s, and no row that died since then can be vacuumed', a.state, a.usename,
                coalesce(nullif(a.application_name, ''), 'unnamed'), a.xact_start),
         format('select pg_terminate_backend(%s);', a.pid), true
  from pg_stat_activity a
  where a.datname = current_database()
    and a.backend_type = 'client backend'
    and a.pid <> pg_backend_pid()
    and coalesce(a.backend_xmin, a.backend_xid) is not null
    and a.xact_start <= since
  order by a.xact_start;

  return query
  select 'transaction held open', 'prepared transaction ' || x.gid, format('of %s, since %s', x.owner, x.prepared),
         format('rollback prepared %L;', x.gid), true
  from pg_prepared_xacts x
  where x.database = current_database()
    and x.prepared <= since
  order by x.prepared;

  return query
  select 'transaction held open', 'replication slot ' || s.slot_name,
         format('%s; it holds back the last %s transactions', case when s.active then 'in use' else 'not in use' end, h.held),
         case when not s.active then format('select pg_drop_replication_slot(%L);', s.slot_name) end, true
  from pg_replication_slots s
  cross join lateral (
    select greatest(pg_catalog.age(s.xmin), pg_catalog.age(s.catalog_xmin)) as held
  ) h
  where h.held >= transactions
  order by s.slot_name;
end
$$;

-- When the queue of notifications is full, nothing commits that notifies. It is cut behind the slowest session that listens.
create or replace function pgpark._notification_queue() returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  return query
  select 'notification queue filling', 'pg_notify', format('%s %% full; some session listens and stays in a transaction',
                                                           round(100 * used)),
         'select pg_terminate_backend(pid) from pg_stat_activity '
         'where state like ''idle in transaction%'' order by xact_start limit 1;', true
  from pg_notification_queue_usage() as used
  where used > 0.5;
end
$$;
