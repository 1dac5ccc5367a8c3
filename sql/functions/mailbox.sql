-- The mailbox: outcomes, addressed by (tenant, user, session) or by task id, kept until taken out or purged.

create or replace function pgpark.park_fetch(
  tenant text,
  user_id text default null,
  session_id text default null,
  since timestamptz default null,
  max_messages int default 50)
returns setof pgpark.message
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
  return query select * from pgpark._fetch(null, tenant, user_id, session_id, since, 0, max_messages);
end
$$;

comment on function pgpark.park_fetch is
'Outcomes in the mailbox of a tenant, oldest first; a null user_id or session_id means any. since: only those that
landed at this time or later. payload is the worker''s result. Messages stay until park_ack takes them out, which is
the safe way to read each once: an outcome that is committed later may carry an earlier time.
Errors: 22023, 42501.';

create or replace function pgpark.park_fetch_of(
  pool text,
  tenant text,
  user_id text default null,
  session_id text default null,
  since timestamptz default null,
  max_messages int default 50)
returns setof pgpark.message
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
  if park_fetch_of.pool is null then
    raise exception 'pool must not be null' using errcode = '22023', hint = 'park_fetch reads those of all pools.';
  end if;
  return query select * from pgpark._fetch(pool, tenant, user_id, session_id, since, 0, max_messages);
end
$$;

comment on function pgpark.park_fetch_of is
'As park_fetch, but only the outcomes of tasks of one pool, also of one that was dropped since. Errors: 22023, 42501.';

-- after: only messages with a greater number.
create or replace function pgpark._fetch(
  pool text, tenant text, user_id text, session_id text, since timestamptz, after bigint, max_messages int)
returns setof pgpark.message
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  stranger constant boolean := pgpark._is_stranger();
begin
  if _fetch.tenant is null then
    raise exception 'tenant must not be null'
      using errcode = '22023', hint = 'The outcome of a task without a tenant is found with park_result(task_id).';
  elsif coalesce(max_messages, 0) < 1 then
    raise exception 'max_messages must be at least 1, not %', coalesce(max_messages::text, 'NULL')
      using errcode = '22023';
  elsif stranger then
    perform pgpark._require(array['producer'], _fetch.pool, array[_fetch.tenant],
                            format('fetch for tenant %L', _fetch.tenant));
  end if;
  return query
  select m.message_id, m.task_id, m.pool, m.tenant, m.user_id, m.session_id, m.status, m.reason, m.payload,
         m.created_at
  from mailbox m
  where m.tenant = _fetch.tenant
    and m.message_id > _fetch.after
    and (_fetch.pool is null or m.pool = _fetch.pool)
    and (_fetch.user_id is null or m.user_id = _fetch.user_id)
    and (_fetch.session_id is null or m.session_id = _fetch.session_id)
    and (_fetch.since is null or m.created_at >= _fetch.since)
    and (not stranger or pgpark._may(array['producer'], m.pool, array[m.tenant]))
  order by m.message_id
  limit max_messages;
end
$$;

create or replace function pgpark.park_ack(message_ids bigint[]) returns int
language plpgsql
security definer
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  perform pgpark._require_read_committed();
  if pgpark._is_stranger() then
    message_ids := array(
      select m.message_id
      from mailbox m
      where m.message_id = any (park_ack.message_ids)
        and pgpark._may(array['producer'], m.pool, array[m.tenant]));
  end if;
  return pgpark._ack(message_ids);
end
$$;

comment on function pgpark.park_ack is
'Takes messages out of the mailbox for good, with their parts, and forgets their idempotency keys. Returns
how many were there. Errors: 25001.';

create or replace function pgpark._ack(message_ids bigint[]) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  taken int;
begin
  perform from submission_key k
  join mailbox m on m.pool_id = k.pool_id
                and coalesce(m.tenant, '') = k.tenant
                and m.idempotency_key = k.idempotency_key
  where m.message_id = any (_ack.message_ids)
  order by k.pool_id, k.tenant, k.idempotency_key  -- as submits lock them, so that the two cannot deadlock
  for update of k;
  perform from mailbox m
  where m.message_id = any (_ack.message_ids)
  order by m.message_id  -- one order for everybody, so that two cannot deadlock
  for update;
  with gone as (
    delete from mailbox m
    where m.message_id = any (_ack.message_ids)
    returning m.pool_id, coalesce(m.tenant, '') as tenant, m.idempotency_key, m.task_id, m.emitted
  ),
  forgotten as (
    delete from submission_key k
    using gone g
    where k.pool_id = g.pool_id
      and k.tenant = g.tenant
      and k.idempotency_key = g.idempotency_key
      and k.task_id = g.task_id
  ),
  silenced as (
    delete from part r
    using gone g
    where g.emitted > 0
      and r.task_id = g.task_id
  )
  select count(*)::int into taken from gone;
  return taken;
end
$$;

create or replace function pgpark.park_result(task_id bigint)
returns setof pgpark.message
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if pgpark._is_stranger() and not pgpark._may_on(array['producer'], park_result.task_id) then
    return;
  end if;
  return query
  select m.message_id, m.task_id, m.pool, m.tenant, m.user_id, m.session_id, m.status, m.reason, m.payload,
         m.created_at
  from mailbox m
  where m.task_id = park_result.task_id;
end
$$;

comment on function pgpark.park_result is
'The mailbox row of one task, if it has ended and its message was not taken out; no row otherwise. Also for tasks that
were submitted without a tenant.';

-- Purges a bite of outcomes that were kept long enough and returns how many. Waits for nobody: an outcome that somebody
-- holds, or whose key somebody holds, is left for the next time.
create or replace function pgpark._purge(now_ timestamptz, bite int) returns int
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  due bigint[] := array(
    select m.message_id from mailbox m where m.purge_at <= now_ order by m.purge_at limit bite);
  with_key bigint[];
  held bigint[];  -- those whose key is ours now: keys before outcomes, as in _ack
begin
  with_key := array(
    select m.message_id
    from mailbox m
    join submission_key k on k.pool_id = m.pool_id
                         and k.tenant = coalesce(m.tenant, '')
                         and k.idempotency_key = m.idempotency_key
    where m.message_id = any (due));
  held := array(
    select m.message_id
    from mailbox m
    join submission_key k on k.pool_id = m.pool_id
                         and k.tenant = coalesce(m.tenant, '')
                         and k.idempotency_key = m.idempotency_key
    where m.message_id = any (with_key)
    for update of k skip locked);
  return pgpark._ack(array(
    select m.message_id
    from mailbox m
    where m.message_id = any (due)
      and (m.message_id <> all (with_key) or m.message_id = any (held))
    for update skip locked));
end
$$;

-- When to purge again: at once after a bite that was full, else when the next outcome has been kept long enough, but
-- with a pause, so that outcomes that fall due one by one are purged together. Null: there is nothing to purge.
create or replace function pgpark._next_purge(now_ timestamptz, full_bite boolean) returns timestamptz
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  return (
    select case when full_bite then now_ else greatest(first_.purge_at, now_ + interval '10 seconds') end
    from (select m.purge_at from mailbox m where m.purge_at is not null order by m.purge_at limit 1) first_);
end
$$;
