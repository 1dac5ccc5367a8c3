-- Submitting: a task is checked, then parked, delayed or refused; never half of it.
-- Called by anybody who has work. Takes part in the caller's own transaction.
-- Keeps invariants 4 (a task that is late already is refused) and 5 (depth).
--
-- A refusal is a row with accepted = false. An argument that can never be right is an error (22023, 42704).

create or replace function pgpark.park_submit(
  pool text,
  payload jsonb,
  priority text default 'normal',
  units int default 1,
  deadline timestamptz default null,
  tenant text default null,
  user_id text default null,
  session_id text default null,
  run_at timestamptz default null,
  idempotency_key text default null)
returns table (task_id bigint, accepted boolean, status text, reason text)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  draft pgpark.draft;
  complaint text;
  parked record;
begin
  if pgpark._is_stranger() then
    perform pgpark._require_submit(park_submit.pool, array[park_submit.tenant]);
  end if;
  lot := pgpark._enter_pool(park_submit.pool);
  draft.ord := 1;
  draft.payload := park_submit.payload;
  draft.priority := coalesce(park_submit.priority, 'normal');
  draft.units := coalesce(park_submit.units, 1);
  draft.deadline := park_submit.deadline;
  draft.tenant := park_submit.tenant;
  draft.user_id := park_submit.user_id;
  draft.session_id := park_submit.session_id;
  draft.run_at := park_submit.run_at;
  draft.idempotency_key := park_submit.idempotency_key;
  complaint := pgpark._complaint(draft);
  if complaint is not null then
    perform pgpark._refuse_element(complaint, null);
  end if;
  if draft.idempotency_key is null and lot.max_queue_depth is null and not lot.limited and lot.fairness = 'fifo' then
    parked := pgpark._park_alone(lot, draft);
    task_id := parked.task_id;
    status := parked.status;
    reason := parked.reason;
    accepted := reason is null;
    return next;
  else
    perform pg_current_xact_id();  -- before the number is taken: functions/_front.sql
    draft.task_id := nextval('pgpark.task_task_id_seq');
    return query select * from pgpark._park(lot, array[draft]);
  end if;
end
$$;

comment on function pgpark.park_submit is
'Submits one task. units: slices of the pool that it holds while it runs. priority: low, normal, high or critical.
deadline: by when it must have started (default: the pool''s default_timeout_secs from now, or from run_at).
run_at: not before this time. tenant, user_id, session_id: the address of its outcome in the mailbox.
idempotency_key: a second submit of the same tenant with the same key gets the first task, as long as its outcome is
kept. The settings pgpark.traceparent and pgpark.tracestate of the session or transaction, if they are a W3C trace context,
are kept with the task for its worker: set_config(''pgpark.traceparent'', ''00-...'', true).
Returns one row: task_id (null if refused), accepted, status (parked, delayed, rejected; the present status of the
first task for a duplicate) and reason (queue_full, deadline_expired, too_large: more units than the pool could ever give,
payload_too_large, pool_closed, duplicate).
Errors: 22023 bad value, 42704 unknown pool, 25001 wrong isolation level, 42501 not granted.';

create or replace function pgpark.park_submit_many(pool text, tasks jsonb)
returns table (task_id bigint, accepted boolean, status text, reason text)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  drafts pgpark.draft[];
  rate record;
begin
  perform pgpark._check_elements(tasks);
  if pgpark._is_stranger() then
    perform pgpark._require_submit(
      park_submit_many.pool, array(select distinct e ->> 'tenant' from jsonb_array_elements(tasks) e order by 1));
  end if;
  lot := pgpark._enter_pool(park_submit_many.pool);
  perform pg_current_xact_id();  -- before the numbers are taken: functions/_front.sql
  select r.* into rate from pgpark._llm_rate(lot.cost_model) r;
  drafts := array(
    select row(e.ord, nextval('pgpark.task_task_id_seq'), e.element -> 'payload',
               coalesce(e.element ->> 'priority', 'normal'),
               case when e.element ->> 'prompt_tokens' is null then coalesce((e.element ->> 'units')::numeric::int, 1)
                    else pgpark._llm_charge(lot.name, rate.fixed_bytes, rate.token_bytes, rate.block_tokens,
                                            rate.most_tokens, rate.unit_bytes,
                                            (e.element ->> 'prompt_tokens')::numeric::int,
                                            (e.element ->> 'max_tokens')::numeric::int, e.ord::int) end,
               (e.element ->> 'deadline')::timestamptz, e.element ->> 'tenant', e.element ->> 'user_id',
               e.element ->> 'session_id', (e.element ->> 'run_at')::timestamptz,
               e.element ->> 'idempotency_key')::pgpark.draft
    from jsonb_array_elements(tasks) with ordinality as e (element, ord)
    order by e.ord);
  perform pgpark._refuse_element(c.complaint, c.ord)
  from (select pgpark._complaint(d) as complaint, d.ord from unnest(drafts) d) c
  where c.complaint is not null;
  return query select * from pgpark._park(lot, drafts);
end
$$;

comment on function pgpark.park_submit_many is
'Submits an array of tasks at once. Each element is an object with the arguments of park_submit as its keys (payload
is required); prompt_tokens and max_tokens instead of units charge by the pool''s cost_model. Returns one row per
element, in order, with the columns of park_submit. A refusal concerns its element alone; an error (22023, its DETAIL
names the element, counted from 1) leaves all of them unsubmitted.
Errors: 22023, 42704, 25001, 42501.';

-- Raises 42501 unless the caller may submit to this pool, and for each of these tenants.
create or replace function pgpark._require_submit(pool text, tenants text[]) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  tenant text;
begin
  perform pgpark._require_pool('producer', _require_submit.pool, 'submit to');
  foreach tenant in array tenants loop
    perform pgpark._require(array['producer'], _require_submit.pool, array[tenant],
                            format('submit to pool %L ', _require_submit.pool)
                            || coalesce('for tenant ' || quote_literal(tenant), 'without a tenant'));
  end loop;
end
$$;

-- The pool, with its entrance held open until the transaction ends.
create or replace function pgpark._enter_pool(name text) returns pgpark.pool
language plpgsql
set search_path = pgpark, pg_temp
as $$
declare
  seen record;
  lot pgpark.pool;
begin
  if pgpark._sees_the_past() then
    perform pgpark._require_read_committed();
  end if;
  loop
    select p.pool_id, p.door into seen from pool p where p.name = _enter_pool.name;
    if not found then
      perform pgpark._unknown_pool(_enter_pool.name);
    end if;
    execute 'lock table pgpark.door_' || seen.door || ' in row share mode';  -- _lock_entrance, not alone
    -- As it is now that nobody can close it; not the one that was seen if that was dropped and made anew meanwhile.
    select p.* into lot from pool p where p.name = _enter_pool.name;
    exit when lot.pool_id = seen.pool_id;
  end loop;
  return lot;
end
$$;

-- What is wrong with a draft that no pool could ever accept; null: nothing.
create or replace function pgpark._complaint(draft pgpark.draft) returns text
language sql stable
as $$
  select case
    when draft.payload is null then 'payload is missing; send any JSON value, ''null'' and ''{}'' included'
    when pgpark._priority_level(draft.priority) is null then
      format('unknown priority %L; use %s', draft.priority, array_to_string(pgpark._priority_names(), ', '))
    when draft.units < 1 then format('units must be at least 1, not %s', draft.units)
    when not isfinite(draft.run_at) or draft.run_at >= timestamptz '9999-01-01' then
      format('run_at must be a time before the year 9999, not %s', draft.run_at)
    when greatest(octet_length(draft.tenant), octet_length(draft.user_id), octet_length(draft.session_id),
                  octet_length(draft.idempotency_key)) > 255 then
      'tenant, user_id, session_id and idempotency_key take at most 255 bytes each'
  end;
$$;

-- The deadline that holds for a draft. One beyond what most calendars can hold is none.
create or replace function pgpark._due(lot pgpark.pool, draft pgpark.draft, now_ timestamptz) returns timestamptz
language sql stable
as $$
  select case when coalesce(draft.deadline, greatest(now_, draft.run_at) + pgpark._secs(lot.default_timeout_secs))
                   < timestamptz '9999-01-01'
              then coalesce(draft.deadline, greatest(now_, draft.run_at) + pgpark._secs(lot.default_timeout_secs)) end;
$$;

-- The most units that a task of this tenant may have.
create or replace function pgpark._most_units(lot pgpark.pool, tenant text) returns int
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return least(lot.max_units, (select n.max_units from tenant n
                               where n.pool_id = lot.pool_id and n.tenant = coalesce(_most_units.tenant, '')));
end
$$;

-- Why a pool refuses a draft, keys and depth aside; null: it does not.
create or replace function pgpark._refusal(lot pgpark.pool, draft pgpark.draft, due timestamptz, now_ timestamptz)
returns text
language sql stable
as $$
  select case
    when lot.state in ('draining', 'disabled') then 'pool_closed'
    when draft.units > case when lot.limited then pgpark._most_units(lot, draft.tenant) else lot.max_units end
      then 'too_large'
    when lot.max_payload_kb is not null and pgpark._json_kb(draft.payload) > lot.max_payload_kb then 'payload_too_large'
    when due <= greatest(now_, draft.run_at) + pgpark._secs(lot.scheduling_slack_secs) then 'deadline_expired'
  end;
$$;

-- The message of a draft in its pool's queue. Without an address and times, as most are, it is built faster.
create or replace function pgpark._message(lot pgpark.pool, draft pgpark.draft, due timestamptz, now_ timestamptz)
returns jsonb
language sql stable
as $$
  select jsonb_build_object(
    'metadata',
    case when draft.tenant is null and draft.user_id is null and draft.session_id is null and due is null
              and draft.run_at is null
         then ('{"task_id":' || draft.task_id || ',"pool":"' || lot.name || '","priority":"' || draft.priority
               || '","units":' || draft.units || ',"created_at":' || to_json(now_) || '}')::jsonb
         else jsonb_strip_nulls(jsonb_build_object(
                'task_id', draft.task_id, 'pool', lot.name, 'priority', draft.priority, 'units', draft.units,
                'tenant', draft.tenant, 'user_id', draft.user_id, 'session_id', draft.session_id, 'deadline', due,
                'run_at', draft.run_at, 'created_at', now_)) end,
    'payload', draft.payload);
$$;

-- Raises 22023 for an element of park_submit_many that is not of the right form; its values are checked later.
create or replace function pgpark._check_elements(tasks jsonb) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  bad record;
  keys constant text[] := array['payload', 'priority', 'units', 'deadline', 'tenant', 'user_id', 'session_id',
                                'run_at', 'idempotency_key', 'prompt_tokens', 'max_tokens'];
begin
  if jsonb_typeof(tasks) is distinct from 'array' then
    raise exception 'tasks must be a JSON array, not %', coalesce(jsonb_typeof(tasks), 'NULL')
      using errcode = '22023', hint = 'For example: [{"payload": {"prompt": "hello"}, "units": 8}]';
  end if;
  select e.ord, c.complaint into bad
  from jsonb_array_elements(tasks) with ordinality as e (element, ord)
  cross join lateral (
    select case
      when jsonb_typeof(e.element) <> 'object' then
        format('a task must be a JSON object, not %s', jsonb_typeof(e.element))
      when e.element - 'payload' = '{}' then  -- nothing else in it: the usual case
        null
      when e.element - keys <> '{}' then
        format('unknown key %L; a task has %s',
               (select min(k) from jsonb_object_keys(e.element - keys) k), array_to_string(keys, ', '))
      when jsonb_typeof(e.element -> 'units') not in ('number', 'null')
           or e.element ->> 'units' !~ '^[0-9]{1,10}([.]0*)?$'
           or (e.element ->> 'units')::numeric > 2147483647 then
        format('units must be a whole number of at least 1, not %s', e.element -> 'units')
      when num_nonnulls(e.element ->> 'prompt_tokens', e.element ->> 'max_tokens') > 0
           and pgpark._bad_tokens(e.element) is not null then
        pgpark._bad_tokens(e.element)
      when jsonb_typeof(e.element -> 'priority') not in ('string', 'null') then
        format('unknown priority %s; use %s', e.element -> 'priority',
               array_to_string(pgpark._priority_names(), ', '))
      when e.element ? 'deadline' and not pgpark._is_time(e.element -> 'deadline') then
        format('deadline must be a time such as "2030-01-31T12:00:00Z", not %s', e.element -> 'deadline')
      when e.element ? 'run_at' and not pgpark._is_time(e.element -> 'run_at') then
        format('run_at must be a time such as "2030-01-31T12:00:00Z", not %s', e.element -> 'run_at')
      when e.element ?| array['tenant', 'user_id', 'session_id', 'idempotency_key'] then (
        select format('%s must be a string, not %s', t.key, e.element -> t.key)
        from unnest(array['tenant', 'user_id', 'session_id', 'idempotency_key']) as t (key)
        where jsonb_typeof(e.element -> t.key) not in ('string', 'null')
        limit 1)
    end as complaint
  ) c
  where c.complaint is not null
  order by e.ord
  limit 1;
  if found then
    perform pgpark._refuse_element(bad.complaint, bad.ord::int);
  end if;
end
$$;

-- What is wrong with an element that tells its tokens; null: nothing.
create or replace function pgpark._bad_tokens(element jsonb) returns text
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
declare
  key text;
begin
  foreach key in array array['prompt_tokens', 'max_tokens'] loop
    if element ->> key is null then
      return 'prompt_tokens and max_tokens go together, and ' || key || ' is missing';
    elsif jsonb_typeof(element -> key) <> 'number' or element ->> key !~ '^[0-9]{1,10}([.]0*)?$'
          or (element ->> key)::numeric > 2147483647 then
      return format('%s must be a whole number from 0 to 2147483647, not %s', key, element -> key);
    end if;
  end loop;
  if element ->> 'units' is not null then
    return 'give units, or prompt_tokens and max_tokens, not both';
  end if;
  return null;
end
$$;

-- Whether a JSON value is absent, null or text that Postgres reads as a time.
create or replace function pgpark._is_time(value jsonb) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  if value is null or jsonb_typeof(value) = 'null' then
    return true;
  elsif jsonb_typeof(value) <> 'string' then
    return false;
  end if;
  perform (value #>> '{}')::timestamptz;
  return true;
exception
  when data_exception then
    return false;
end
$$;

-- _park for one draft without a key, into a pool without depth, fair share and limits.
create or replace function pgpark._park_alone(lot pgpark.pool, draft pgpark.draft,
                                              out task_id bigint, out status text, out reason text)
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  now_ timestamptz;
  due timestamptz;
  delayed boolean;
  messages jsonb[];
begin
  perform pg_current_xact_id();  -- before the number is taken, and the time is read: functions/_front.sql
  now_ := pgpark._now();
  due := pgpark._due(lot, draft, now_);
  delayed := coalesce(draft.run_at > now_, false);
  reason := pgpark._refusal(lot, draft, due, now_);
  if reason is not null then
    status := 'rejected';
    if lot.audit then
      perform pgpark._audit_drafts(lot, array[draft], array[reason], now_);
    end if;
    return;
  end if;
  draft.task_id := nextval('pgpark.task_task_id_seq');
  messages := array[pgpark._message(lot, draft, due, now_)];
  if current_setting('pgpark.traceparent', true) <> '' then
    messages := pgpark._with_trace(messages);
  end if;
  insert into task (task_id, pool_id, msg_id, state, priority, units, tenant, user_id, session_id, deadline, run_at,
                    created_at)
  values (draft.task_id, lot.pool_id, (pgpark._send(lot, messages))[1],
          case when delayed then 'delayed' else 'parked' end, pgpark._priority_level(draft.priority), draft.units,
          draft.tenant, draft.user_id, draft.session_id, due, case when delayed then draft.run_at end, now_);
  if lot.audit then
    perform pgpark._audit_drafts(lot, array[draft], null, now_);
  end if;
  perform pgpark._wake(lot.name);
  task_id := draft.task_id;
  status := case when delayed then 'delayed' else 'parked' end;
end
$$;

-- Decides on drafts and stores what is accepted; one row per draft, in order.
create or replace function pgpark._park(lot pgpark.pool, drafts pgpark.draft[])
returns table (task_id bigint, accepted boolean, status text, reason text)
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
  now_ timestamptz := pgpark._now();
  -- By the position of the draft: the deadline that holds, the refusal (null: taken), and the task that the
  -- idempotency key belongs to (its own where there is none).
  due timestamptz[];
  refusals text[];
  owners bigint[];
begin
  due := array(select pgpark._due(lot, d, now_) from unnest(drafts) d order by d.ord);
  refusals := array(select pgpark._refusal(lot, d, due[d.ord], now_) from unnest(drafts) d order by d.ord);

  if lot.kept_in_memory and exists (select from unnest(drafts) d where d.idempotency_key is not null) then
    perform pgpark._recall(lot, bite => 1000);  -- a key whose outcome was lost in a crash would stand in the way
  end if;

  -- Keys. The first to insert one owns it; a second one waits here for the first to commit. A known key wins over a
  -- refusal: a client that repeats its call late must learn of its first task.
  while exists (select from unnest(drafts) d where d.idempotency_key is not null) loop
    insert into submission_key (pool_id, tenant, idempotency_key, task_id)
    select lot.pool_id, coalesce(d.tenant, ''), d.idempotency_key, d.task_id
    from unnest(drafts) d
    where d.idempotency_key is not null
      and refusals[d.ord] is null
    order by coalesce(d.tenant, ''), d.idempotency_key, d.ord  -- one order for everybody, so that two batches cannot deadlock
    on conflict do nothing;

    -- Held until we commit, so that no acknowledgement takes a key away from under its duplicate.
    perform
    from (select distinct coalesce(d.tenant, '') as tenant, d.idempotency_key from unnest(drafts) d) d
    join submission_key k on k.pool_id = lot.pool_id
                         and k.tenant = d.tenant
                         and k.idempotency_key = d.idempotency_key
    order by k.tenant, k.idempotency_key
    for key share of k;
    owners := array(
      select case when d.idempotency_key is null or (k.task_id is null and refusals[d.ord] is not null) then d.task_id
                  else k.task_id end
      from unnest(drafts) d
      left join submission_key k on k.pool_id = lot.pool_id
                                and k.tenant = coalesce(d.tenant, '')
                                and k.idempotency_key = d.idempotency_key
      order by d.ord);
    continue when array_position(owners, null) is not null;  -- one was acknowledged between insert and look

    -- A duplicate is one whose key belongs to a task from before, or to an earlier one of this batch.
    refusals := array(
      select case when owners[d.ord] <> d.task_id and coalesce(o.ord < d.ord, true) then 'duplicate'
                  else refusals[d.ord] end
      from unnest(drafts) d
      left join unnest(drafts) o on o.task_id = owners[d.ord]
      order by d.ord);
    exit;
  end loop;

  if lot.max_queue_depth is not null and array_position(refusals, null) is not null then
    refusals := pgpark._find_places(lot, drafts, refusals);
    if owners is not null and array_position(refusals, 'queue_full') is not null then
      -- The key of a task that found no room is free again, and its duplicates in this batch find none either.
      refusals := array(
        select case when r.refusal = 'duplicate' and owners[r.ord] = any (full_.task_ids) then 'queue_full'
                    else r.refusal end
        from unnest(refusals) with ordinality as r (refusal, ord)
        cross join (
          select array_agg(owners[r.ord]) as task_ids
          from unnest(refusals) with ordinality as r (refusal, ord)
          where r.refusal = 'queue_full'
        ) full_
        order by r.ord);
      delete from submission_key k
      using unnest(refusals) with ordinality as r (refusal, ord)
      where r.refusal = 'queue_full'
        and k.pool_id = lot.pool_id
        and k.tenant = coalesce(drafts[r.ord].tenant, '')
        and k.idempotency_key = drafts[r.ord].idempotency_key
        and k.task_id = owners[r.ord];
    end if;
  end if;

  if array_position(refusals, null) is not null then
    perform pgpark._store(
      lot, array(select d from unnest(drafts) d where refusals[d.ord] is null order by d.ord),
      array(select due[d.ord] from unnest(drafts) d where refusals[d.ord] is null order by d.ord), now_);
  end if;
  if lot.audit and exists (select from unnest(refusals) as r (refusal) where r.refusal <> 'duplicate') then
    perform pgpark._audit_drafts(
      lot, array(select d from unnest(drafts) d where refusals[d.ord] <> 'duplicate' order by d.ord),
      array(select refusals[d.ord] from unnest(drafts) d where refusals[d.ord] <> 'duplicate' order by d.ord), now_);
  end if;

  return query
  select case when r.refusal is null then drafts[r.ord].task_id
              when r.refusal = 'duplicate' then owners[r.ord] end,
         coalesce(r.refusal = 'duplicate', true),
         case when r.refusal is null then case when drafts[r.ord].run_at > now_ then 'delayed' else 'parked' end
              when r.refusal = 'duplicate' then coalesce(
                (select t.state from task t where t.task_id = owners[r.ord]),
                (select m.status from mailbox m where m.task_id = owners[r.ord]))
              else 'rejected' end,
         r.refusal
  from unnest(refusals) with ordinality as r (refusal, ord)
  order by r.ord;
end
$$;

-- Writes accepted drafts: their messages into the pool's queue, their tasks into the ledger. due: their deadlines.
create or replace function pgpark._store(lot pgpark.pool, drafts pgpark.draft[], due timestamptz[], now_ timestamptz)
returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  messages jsonb[];
  msg_ids bigint[];
  tags double precision[];
begin
  messages := array(
    select pgpark._message(lot, d.draft, due[d.nth], now_)
    from (select d as draft, row_number() over () as nth from unnest(drafts) d) d
    order by d.nth);
  if current_setting('pgpark.traceparent', true) <> '' then
    messages := pgpark._with_trace(messages);
  end if;
  msg_ids := pgpark._send(lot, messages);

  if lot.fairness = 'tenant' then
    perform pgpark._lock_tenants(lot.pool_id, array(select coalesce(d.tenant, '') from unnest(drafts) d));
    tags := pgpark._stamp(
      lot, array(select case when d.run_at > now_ is not true then coalesce(d.tenant, '') end from unnest(drafts) d),
      array(select pgpark._priority_level(d.priority) from unnest(drafts) d), array(select d.units from unnest(drafts) d));
  end if;

  insert into task (task_id, pool_id, msg_id, state, priority, units, tenant, user_id, session_id, deadline, run_at,
                    created_at, idempotency_key, start_tag, share, lane)
  select d.task_id, lot.pool_id, msg_ids[d.nth], case when d.delayed then 'delayed' else 'parked' end,
         pgpark._priority_level(d.priority), d.units, d.tenant, d.user_id, d.session_id, due[d.nth],
         case when d.delayed then d.run_at end, now_, d.idempotency_key,
         coalesce(tags[d.nth], 0),
         case when not d.delayed and lot.fairness = 'tenant' then coalesce(d.tenant, '') end,
         case when not d.delayed and lot.limited then pgpark._lane(lot.pool_id, d.tenant) end
  from (
    select d.*, d.run_at > now_ is true as delayed
    from unnest(drafts) with ordinality as d (ord, task_id, payload, priority, units, deadline, tenant, user_id,
                                              session_id, run_at, idempotency_key, nth)
  ) d;
  if lot.audit then
    perform pgpark._audit_drafts(lot, drafts, null, now_);
  end if;
  perform pgpark._wake(lot.name);
end
$$;
