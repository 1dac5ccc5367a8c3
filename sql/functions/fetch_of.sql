-- The mailbox of one pool. Called by clients that expect results of one kind.

create or replace function pgpark.park_fetch_of(
  pool text,
  tenant text,
  user_id text default null,
  session_id text default null,
  since timestamptz default null,
  max_messages int default 50)
returns setof pgpark.message
language plpgsql stable
set search_path = pgpark, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  if park_fetch_of.pool is null or park_fetch_of.tenant is null then
    raise exception '% must not be null', case when park_fetch_of.pool is null then 'pool' else 'tenant' end
      using errcode = '22023', hint = 'The outcome of a task without a tenant is found with park_result(task_id).';
  elsif coalesce(max_messages, 0) < 1 then
    raise exception 'max_messages must be at least 1, not %', coalesce(max_messages::text, 'NULL')
      using errcode = '22023';
  end if;
  return query
  select m.message_id, m.task_id, m.pool, m.tenant, m.user_id, m.session_id, m.status, m.reason, m.payload,
         m.created_at
  from mailbox m
  where m.tenant = park_fetch_of.tenant
    and m.pool = park_fetch_of.pool
    and (park_fetch_of.user_id is null or m.user_id = park_fetch_of.user_id)
    and (park_fetch_of.session_id is null or m.session_id = park_fetch_of.session_id)
    and (park_fetch_of.since is null or m.created_at >= park_fetch_of.since)
  order by m.message_id
  limit max_messages;
end
$$;

comment on function pgpark.park_fetch_of is
'As park_fetch, but only the outcomes of tasks of one pool, also of one that was dropped since. Errors: 22023.';
