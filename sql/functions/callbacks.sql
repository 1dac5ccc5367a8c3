-- Callbacks: whoever gave a pool a URL is told of every outcome that has a tenant. `_conclude` puts a copy of the mailbox
-- row into the outbox, in the transaction of the outcome; a delivery loop (`pgpark notifier run`, a worker, or any
-- program) takes what is due, posts it, and reports the answer. Delivery is at least once: a callback leaves the outbox
-- only with a 2xx, or for the dead letters, where it stays until somebody retries it.
--
-- The outbox and the dead letters are pgmq queues. `vt` is when a callback is due: now, at the end of its lease while
-- somebody delivers it, or after a backoff; `read_ct` is the number of its attempts; `headers` hold the last failure. They are
-- read here rather than with pgmq.read(), which takes the oldest message first: a pool whose receiver is down would have its
-- backlog tried before what is new in every other. A callback keeps its id when it moves between the two queues.
--
-- URL and secret are those of the pool at the time of delivery, so that a correction holds for what waits.

-- Puts the outcomes of these ended tasks of one pool into the outbox. Called by _conclude for a pool with a notifier.
create or replace function pgpark._post_callbacks(task_ids bigint[], pool_name text) returns void
language plpgsql
set search_path = pgpark, pg_temp
set timezone = 'UTC'
as $$
#variable_conflict use_column
declare
  bodies jsonb[];
begin
  select array_agg(
           jsonb_build_object(
             'message_id', m.message_id, 'task_id', m.task_id, 'pool', m.pool, 'tenant', m.tenant, 'user_id', m.user_id,
             'session_id', m.session_id, 'status', m.status, 'reason', m.reason, 'payload', m.payload,
             'created_at', m.created_at)
           order by m.message_id)
  into bodies
  from mailbox m
  where m.task_id = any (task_ids)
    and m.tenant is not null;
  if bodies is not null then
    perform pgmq.send_batch('pgpark_outbox', bodies, null::jsonb[], pgpark._now());
    perform pg_notify('pgpark.callback', pool_name);
  end if;
end
$$;

create or replace function pgpark.park_callbacks(max_callbacks int default 10, pool text default null)
returns setof pgpark.callback
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
declare
  now_ timestamptz := pgpark._now();
  due bigint[];
begin
  perform pgpark._require_read_committed();
  if coalesce(max_callbacks, 0) < 1 then
    raise exception 'max_callbacks must be at least 1, not %', coalesce(max_callbacks::text, 'NULL')
      using errcode = '22023';
  elsif pgpark._is_stranger() then
    perform pgpark._require(array['worker'], park_callbacks.pool, '{}', 'deliver callbacks'
                            || coalesce(' of pool ' || quote_literal(park_callbacks.pool), ''));
  end if;
  -- The longest due of each pool, pools in turns; what somebody else holds is passed over.
  due := array(
    select c.msg_id
    from unnest(case when park_callbacks.pool is not null then array[park_callbacks.pool]
                     else array(select w.pool from pgpark.park_callbacks_due() w where w.due <= now_) end) as w (pool)
    cross join lateral (
      select d.msg_id, d.vt, row_number() over (order by d.vt, d.msg_id) as turn
      from (
        select q.msg_id, q.vt
        from pgmq.q_pgpark_outbox q
        where q.message ->> 'pool' = w.pool
          and q.vt <= now_
        order by q.vt
        limit max_callbacks
        for update skip locked
      ) d
    ) c
    order by c.turn, c.vt
    limit max_callbacks);
  if cardinality(due) = 0 then
    return;
  end if;
  perform pgpark._bury_hopeless(due);

  return query
  with leased as (
    update pgmq.q_pgpark_outbox q
    set vt = now_ + pgpark._secs((p.notifier ->> 'timeout_secs')::double precision + 10),
        read_ct = q.read_ct + 1,
        last_read_at = now_
    from pool p
    where q.msg_id = any (due)
      and p.name = q.message ->> 'pool'
      and p.notifier is not null
    returning q.msg_id, q.read_ct, q.message, p.pool_id, p.name, p.notifier
  )
  select l.msg_id, (l.message ->> 'task_id')::bigint, l.name, l.read_ct, pgpark._callback_url(l.notifier, l.message),
         s.auth_header, (l.notifier ->> 'timeout_secs')::double precision, l.message
  from leased l
  left join pool_secret s on s.pool_id = l.pool_id
  order by l.msg_id;
end
$$;

comment on function pgpark.park_callbacks is
'Takes up to max_callbacks callbacks that are due, of one pool (null: of all in turns), for delivery: POST body as JSON to
url, with the header Authorization: auth_header unless that is null (it is a secret), and Idempotency-Key: task_id, within
timeout_secs seconds in all. Report with park_callback_done(callback_id, attempt, http_status). Until timeout_secs and 10
more seconds have passed nobody else gets them; then they are due again: an attempt that nobody reported counts. Parts of
url are percent-encoded. Callbacks whose pool has no notifier any more, or whose attempts are used up, become dead letters
on the way, so there can be more due when fewer come back. LISTEN "pgpark.callback" (with the pool''s name) and
park_callbacks_due() tell when to call. Errors: 22023, 25001, 42501.';

-- Of these callbacks, those that nobody can deliver or that were tried often enough become dead letters.
create or replace function pgpark._bury_hopeless(callback_ids bigint[]) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  nowhere bigint[];
  used_up bigint[];
begin
  select array_agg(q.msg_id) filter (where p.notifier is null),
         array_agg(q.msg_id) filter (where q.read_ct >= (p.notifier ->> 'max_attempts')::int)
  into nowhere, used_up
  from pgmq.q_pgpark_outbox q
  left join pool p on p.name = q.message ->> 'pool'
  where q.msg_id = any (callback_ids);
  perform pgpark._bury(nowhere, null, 'the pool has no notifier any more');
  perform pgpark._bury(used_up, null, null);
end
$$;

create or replace function pgpark.park_callback_done(
  callback_id bigint,
  attempt int,
  http_status int default null,
  error text default null,
  retry_after_secs double precision default null)
returns text
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
declare
  status constant int := park_callback_done.http_status;
  why constant text := left(coalesce(park_callback_done.error, 'HTTP ' || status, 'no answer'), 500);
  waiting record;
  attempts_allowed int;
begin
  perform pgpark._require_read_committed();
  if pgpark._is_stranger() and not pgpark._may(
    array['worker'],
    coalesce((select q.message ->> 'pool' from pgmq.q_pgpark_outbox q where q.msg_id = park_callback_done.callback_id),
             (select q.message ->> 'pool' from pgmq.q_pgpark_dead_letters q
              where q.msg_id = park_callback_done.callback_id), ''),
    '{}'
  ) then
    return 'unknown';
  end if;
  select q.msg_id, q.read_ct, q.message ->> 'pool' as pool into waiting
  from pgmq.q_pgpark_outbox q
  where q.msg_id = park_callback_done.callback_id
  for update;
  if status between 200 and 299 then  -- of whatever attempt: it has arrived
    if waiting.msg_id is null then
      delete from pgmq.q_pgpark_dead_letters q
      where q.msg_id = park_callback_done.callback_id
      returning q.message ->> 'pool' into waiting.pool;
      if not found then
        return 'unknown';
      end if;
    else
      perform pgmq.delete('pgpark_outbox', waiting.msg_id);
    end if;
    perform pgpark._count_callbacks(waiting.pool, 'delivered', 1);
    return 'delivered';
  elsif waiting.msg_id is null or waiting.read_ct is distinct from park_callback_done.attempt then
    return 'unknown';
  end if;

  select (p.notifier ->> 'max_attempts')::int into attempts_allowed from pool p where p.name = waiting.pool;
  if (status between 400 and 499 and status not in (408, 425, 429))
     or waiting.read_ct >= coalesce(attempts_allowed, 0) then
    perform pgpark._bury(array[waiting.msg_id], status, why);
    return 'dead';
  end if;
  update pgmq.q_pgpark_outbox q
  set vt = pgpark._now() + pgpark._secs(greatest(
             pgpark._callback_backoff(waiting.read_ct),
             case when park_callback_done.retry_after_secs > 0
                  then least(park_callback_done.retry_after_secs, 86400) end)),
      headers = jsonb_build_object('http_status', status, 'error', why)
  where q.msg_id = waiting.msg_id;
  perform pgpark._count_callbacks(waiting.pool, 'retry', 1);
  return 'retry';
end
$$;

comment on function pgpark.park_callback_done is
'Reports what came of an attempt to deliver a callback. http_status: of the answer, null if there was none; error: for
people, without secrets; retry_after_secs: what the receiver asked for, in seconds, at most a day is heeded. Returns
delivered (2xx, also from a late attempt), retry (no answer, 1xx, 3xx, 408, 425, 429, 5xx: due again after a backoff that
doubles from a second to an hour), dead (any other 4xx, or notifier.max_attempts used up: see park_dead_letters) or
unknown (it is no longer there, or another attempt is under way; nothing was changed). Errors: 25001.';

-- Seconds until the attempt after this one: doubles from 1 to 3600, of which a random quarter is taken off so that
-- callbacks that failed together do not come back together. Twenty attempts take about seven hours.
create or replace function pgpark._callback_backoff(attempt int) returns double precision
language sql volatile
as $$
  select least(3600, power(2, least(attempt, 13) - 1)) * (1 - random() / 4);
$$;

create or replace function pgpark.park_callbacks_due() returns table (pool text, due timestamptz)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  -- From pool to pool through the index, however many callbacks wait in each.
  return query
  with recursive waiting (pool, due) as (
    (select q.message ->> 'pool', q.vt
     from pgmq.q_pgpark_outbox q
     order by q.message ->> 'pool', q.vt
     limit 1)
    union all
    select following.pool, following.due
    from waiting w
    cross join lateral (
      select q.message ->> 'pool' as pool, q.vt as due
      from pgmq.q_pgpark_outbox q
      where q.message ->> 'pool' > w.pool
      order by q.message ->> 'pool', q.vt
      limit 1
    ) following
  )
  select w.pool, w.due
  from waiting w
  where not pgpark._is_stranger()
     or pgpark._may(array['reader', 'worker'], w.pool, '{}');
end
$$;

comment on function pgpark.park_callbacks_due is
'A row for each pool with callbacks in the outbox: when the next one is due (in the past: call park_callbacks; one that is
being delivered: the end of its lease).';

create or replace function pgpark.park_dead_letters(pool text default null, max_letters int default 50)
returns setof pgpark.dead_letter
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._require('{}', null, '{}', 'see dead letters');
  if coalesce(max_letters, 0) < 1 then
    raise exception 'max_letters must be at least 1, not %', coalesce(max_letters::text, 'NULL')
      using errcode = '22023';
  end if;
  return query
  select q.msg_id, (q.message ->> 'task_id')::bigint, q.message ->> 'pool', q.message ->> 'tenant', q.headers ->> 'url',
         (q.headers ->> 'attempts')::int, (q.headers ->> 'http_status')::int, q.headers ->> 'error',
         (q.message ->> 'created_at')::timestamptz, (q.headers ->> 'died_at')::timestamptz
  from pgmq.q_pgpark_dead_letters q
  where park_dead_letters.pool is null
     or q.message ->> 'pool' = park_dead_letters.pool
  order by q.msg_id
  limit max_letters;
end
$$;

comment on function pgpark.park_dead_letters is
'Callbacks that were given up, oldest first, of one pool (null: of all): where they should have gone, how many attempts
there were, the last answer and error, when the outcome landed and when the callback was given up. They stay until
park_retry_callbacks or pgmq.purge_queue(''pgpark_dead_letters''), also when their pool is dropped. Errors: 22023.';

create or replace function pgpark.park_retry_callbacks(callback_ids bigint[] default null, pool text default null)
returns int
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  now_ timestamptz := pgpark._now();
  retried int;
begin
  perform pgpark._require('{}', null, '{}', 'retry callbacks');
  perform pgpark._require_read_committed();
  with risen as (
    delete from pgmq.q_pgpark_dead_letters q
    where (park_retry_callbacks.callback_ids is null or q.msg_id = any (park_retry_callbacks.callback_ids))
      and (park_retry_callbacks.pool is null or q.message ->> 'pool' = park_retry_callbacks.pool)
    returning q.*
  ),
  waiting as (
    insert into pgmq.q_pgpark_outbox (msg_id, read_ct, enqueued_at, vt, message) overriding system value
    select r.msg_id, 0, r.enqueued_at, now_, r.message
    from risen r
    returning message ->> 'pool' as pool
  )
  select coalesce(sum(w.callbacks), 0)::int into retried
  from (select w.pool, count(*) as callbacks, pg_notify('pgpark.callback', w.pool) from waiting w group by w.pool) w;
  return retried;
end
$$;

comment on function pgpark.park_retry_callbacks is
'Puts dead letters back into the outbox, due now and with all attempts before them: those with these callback_ids (null:
any) of this pool (null: any). Returns how many. Errors: 25001, 42501.';

-- Callbacks of the outbox become dead letters. error: null for what the last failure was, or that there is no report.
create or replace function pgpark._bury(callback_ids bigint[], http_status int, error text) returns void
language plpgsql
set search_path = pgpark, pg_temp
set timezone = 'UTC'
as $$
#variable_conflict use_column
declare
  now_ timestamptz := pgpark._now();
begin
  if coalesce(cardinality(callback_ids), 0) = 0 then
    return;
  end if;
  perform from pgmq.q_pgpark_outbox q
  where q.msg_id = any (callback_ids)
  order by q.msg_id  -- one order for everybody, so that two cannot deadlock
  for update;
  with given_up as (
    delete from pgmq.q_pgpark_outbox q
    where q.msg_id = any (callback_ids)
    returning q.*
  ),
  counted as (
    select pgpark._count_callbacks(g.pool, 'dead', g.letters)
    from (select g.message ->> 'pool' as pool, count(*) as letters from given_up g group by 1) g
  )
  insert into pgmq.q_pgpark_dead_letters (msg_id, read_ct, enqueued_at, last_read_at, vt, message, headers)
    overriding system value
  select g.msg_id, 0, g.enqueued_at, g.last_read_at, now_, g.message,
         jsonb_build_object(
           'url', pgpark._callback_url(p.notifier, g.message),
           'attempts', g.read_ct,
           'http_status', coalesce(_bury.http_status,
                                   case when _bury.error is null then (g.headers ->> 'http_status')::int end),
           'error', coalesce(_bury.error, g.headers ->> 'error', 'nobody reported what came of the last attempt'),
           'died_at', now_)
  from given_up g
  left join pool p on p.name = g.message ->> 'pool'
  where (select count(*) from counted) > 0;
end
$$;

-- All that waits for a pool: its notifier is taken away, or it is dropped. Called by park_put_pool and park_drop_pool.
create or replace function pgpark._bury_all(pool_name text, error text) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._bury(
    array(select q.msg_id from pgmq.q_pgpark_outbox q where q.message ->> 'pool' = pool_name), null, _bury_all.error);
end
$$;

-- RFC 3986: every byte of the UTF-8 form but the unreserved characters. A part that is . or .. would be taken for a step
-- in the path, so its dots are encoded too.
create or replace function pgpark._percent_encoded(part text) returns text
language sql stable
as $$
  select case
    when part in ('.', '..') then replace(part, '.', '%2E')
    when part ~ '^[-A-Za-z0-9._~]*$' then part
    else (
      select string_agg(
               case when c.letter ~ '[-A-Za-z0-9._~]' then c.letter
                    else upper(regexp_replace(encode(convert_to(c.letter, 'UTF8'), 'hex'), '(..)', E'%\\1', 'g')) end,
               '' order by c.ord)
      from regexp_split_to_table(part, '') with ordinality as c (letter, ord))
  end;
$$;

-- {base_url}/mailbox/{tenant}[/{user}[/{session}]]; null without a notifier.
create or replace function pgpark._callback_url(notifier jsonb, body jsonb) returns text
language sql stable
as $$
  select rtrim(notifier ->> 'base_url', '/') || '/mailbox/' || pgpark._percent_encoded(body ->> 'tenant')
         || coalesce('/' || pgpark._percent_encoded(body ->> 'user_id')
                     || coalesce('/' || pgpark._percent_encoded(body ->> 'session_id'), ''), '');
$$;
