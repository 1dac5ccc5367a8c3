-- Parts: what a running task tells before it ends, partial results (tokens) and progress. Workers emit them, clients
-- read them live, or late, for as long as the task or its message is there. Keeps invariant 7 (fencing).
--
-- Emitting locks the task's row, as finishing does, but writes it only when an attempt emits for the first time, and for
-- the lease: a row that is updated twenty times a second would leave behind what claims have to walk past for as long as
-- any old snapshot is open. Numbers follow the last part, which one look at the index finds.

create or replace function pgpark.park_emit(task_id bigint, attempt int, parts jsonb, first int default null)
returns boolean
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
begin
  perform pgpark._require_read_committed();
  perform pgpark._check_parts(park_emit.parts, park_emit.first, null);
  if pgpark._is_stranger() and not pgpark._may_on(array['worker'], park_emit.task_id) then
    return false;
  end if;
  return pgpark._emit(park_emit.task_id, park_emit.attempt, park_emit.parts, park_emit.first);
end
$$;

comment on function pgpark.park_emit is
'Adds to what a running task has told so far; readers of park_parts are notified on the channel pgpark.task.<task_id>.
parts: an array of objects {"kind": "partial" or "progress", "content": any JSON of at most 1 MiB}; kind is partial where
it is left out. Of progress only the last is kept, and parts of an earlier attempt are deleted. first: the place of the
first of these parts among all that this attempt emits, counted from 1; a worker that gives it may repeat a call whose
answer it did not get: what is there already is passed over. Returns false when this attempt no longer holds the task;
then nothing was changed. Renews the lease as a heartbeat that names the task does. Errors: 22023 (detail: element N),
54000 (the partial results of this attempt exceed 64 MiB, each counted with 100 bytes more than its JSON), 25001.';

create or replace function pgpark.park_emit_many(emissions jsonb)
returns table (task_id bigint, accepted boolean)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  emission record;
  accepted_places bigint[] := array[]::bigint[];
begin
  perform pgpark._require_read_committed();
  perform pgpark._check_emissions(emissions);
  for emission in
    select (e.element ->> 'task_id')::bigint as task_id, (e.element ->> 'attempt')::int as attempt,
           e.element -> 'parts' as parts, (e.element ->> 'first')::int as first, e.ord
    from jsonb_array_elements(emissions) with ordinality as e (element, ord)
    order by 1, e.ord  -- one order for everybody, as in finishing, so that two batches cannot deadlock
  loop
    continue when pgpark._is_stranger() and not pgpark._may_on(array['worker'], emission.task_id);
    if pgpark._emit(emission.task_id, emission.attempt, emission.parts, emission.first) then
      accepted_places := accepted_places || emission.ord;
    end if;
  end loop;
  return query
  select (e.element ->> 'task_id')::bigint, e.ord = any (accepted_places)
  from jsonb_array_elements(emissions) with ordinality as e (element, ord)
  order by e.ord;
end
$$;

comment on function pgpark.park_emit_many is
'Emits for many tasks in one transaction. Each element is an object with the arguments of park_emit as its keys (task_id,
attempt and parts are required). Returns one row per element, in order: task_id and whether it was accepted; false means
fenced, and that nothing was changed for it. Errors: 22023 (names the element; then nothing was emitted), 54000, 25001.';

create or replace function pgpark.park_parts(task_id bigint, after int default 0, max_parts int default 1000)
returns setof pgpark.task_part
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  if coalesce(max_parts, 0) < 1 then
    raise exception 'max_parts must be at least 1, not %', coalesce(max_parts::text, 'NULL') using errcode = '22023';
  elsif pgpark._is_stranger() and not pgpark._may_on(array['producer'], park_parts.task_id) then
    return;
  end if;
  return query
  select p.task_id, p.number, p.attempt, p.kind, p.content, p.created_at
  from part p
  where p.task_id = park_parts.task_id
    and p.number > coalesce(park_parts.after, 0)
  order by p.number
  limit max_parts;
end
$$;

comment on function pgpark.park_parts is
'What a task has emitted with a number greater than after, in order, at most max_parts rows; of a live task, and of one
that has ended until its message is acknowledged or purged. All are of one attempt. Numbers rise over all attempts: a
reader that sees a new attempt begins anew. To follow a task, LISTEN "pgpark.task.<task_id>" first, then read.
Errors: 22023.';

create or replace function pgpark._largest_part() returns int
language sql immutable
as $$
  select 1024 * 1024;
$$;

-- Bytes that an attempt may emit in partial results: what stops a handler that never ends from filling the disk.
create or replace function pgpark._most_emitted() returns int
language sql immutable
as $$
  select 64 * 1024 * 1024;
$$;

-- Bytes that a part takes beside its content.
create or replace function pgpark._part_overhead() returns int
language sql immutable
as $$
  select 100;
$$;

-- position: of the emission in its batch, for the message; null for a single one, then the parts are the elements.
create or replace function pgpark._check_parts(parts jsonb, first int, "position" int) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  bad record;
begin
  if jsonb_typeof(parts) is distinct from 'array' then
    perform pgpark._refuse_element(
      format('parts must be a JSON array, not %s', coalesce(jsonb_typeof(parts), 'NULL')), "position");
  elsif first < 1 then
    perform pgpark._refuse_element(format('first must be at least 1, not %s', first), "position");
  end if;
  select e.ord, c.complaint into bad
  from jsonb_array_elements(parts) with ordinality as e (element, ord)
  cross join lateral (
    select case
      when jsonb_typeof(e.element) <> 'object' or not e.element ? 'content' then
        'a part is an object with content'
      when e.element - array['kind', 'content'] <> '{}' then
        format('unknown key %L; a part has kind, content',
               (select min(k) from jsonb_object_keys(e.element - array['kind', 'content']) k))
      when coalesce(e.element -> 'kind', '"partial"') not in ('"partial"', '"progress"') then
        format('unknown kind %s; use partial or progress', e.element -> 'kind')
      when octet_length((e.element -> 'content')::text) > pgpark._largest_part() then
        format('content is too large: %s bytes as JSON, at most %s',
               octet_length((e.element -> 'content')::text), pgpark._largest_part())
    end as complaint
  ) c
  where c.complaint is not null
  order by e.ord
  limit 1;
  if found then
    perform pgpark._refuse_element(
      case when "position" is null then '' else format('part %s: ', bad.ord) end || bad.complaint,
      coalesce("position", bad.ord::int));
  end if;
end
$$;

create or replace function pgpark._check_emissions(emissions jsonb) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  emission record;
  keys constant text[] := array['task_id', 'attempt', 'parts', 'first'];
begin
  if jsonb_typeof(emissions) is distinct from 'array' then
    raise exception 'emissions must be a JSON array, not %', coalesce(jsonb_typeof(emissions), 'NULL')
      using errcode = '22023', hint = 'For example: [{"task_id": 1, "attempt": 1, "parts": [{"content": "a token"}]}]';
  end if;
  for emission in
    select e.element, e.ord::int as ord
    from jsonb_array_elements(emissions) with ordinality as e (element, ord)
    order by e.ord
  loop
    if jsonb_typeof(emission.element) <> 'object'
       or coalesce(emission.element ->> 'task_id', '') !~ '^[0-9]{1,18}$'
       or coalesce(emission.element ->> 'attempt', '') !~ '^[0-9]{1,9}$'
       or coalesce(emission.element ->> 'first', '1') !~ '^[0-9]{1,9}$' then
      perform pgpark._refuse_element(
        'an emission is an object with task_id, attempt and, where it is given, first as whole numbers', emission.ord);
    elsif emission.element - keys <> '{}' then
      perform pgpark._refuse_element(
        format('unknown key %L; an emission has %s',
               (select min(k) from jsonb_object_keys(emission.element - keys) k), array_to_string(keys, ', ')),
        emission.ord);
    end if;
    perform pgpark._check_parts(emission.element -> 'parts', (emission.element ->> 'first')::int, emission.ord);
  end loop;
end
$$;

-- Emits checked parts; see park_emit.
create or replace function pgpark._emit(task_id bigint, attempt int, parts jsonb, first int) returns boolean
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
  held record;
  last_ pgpark.part;
  number_ int;        -- the last one so far
  ordinal_ int := 0;  -- what this attempt emitted so far: how many, and their bytes
  volume_ bigint := 0::bigint;
  known int;          -- how many of these parts are there already
  progress_at int;    -- the last progress among these parts
begin
  select t.emitted, t.lease_until, pgpark._secs(l.lease_secs) as lease,
         t.run_until is null or t.run_until > now_ or t.state = 'cancelling' as may_renew
  into held
  from task t
  join pool l using (pool_id)
  where t.task_id = _emit.task_id
    and t.attempt = _emit.attempt
    and pgpark._runs(t.state)
  for no key update of t;
  if not found then
    return false;
  end if;

  -- A heartbeat passes over a row that is locked, and a task that emits is locked often. Its worker is alive, so the
  -- lease is renewed here, by the rule of park_heartbeat and as seldom.
  if held.emitted <> _emit.attempt or (held.may_renew and held.lease_until < now_ + held.lease * 2 / 3) then
    update task t
    set emitted = _emit.attempt,
        lease_until = case when held.may_renew then now_ + held.lease else t.lease_until end
    where t.task_id = _emit.task_id;
  end if;

  select p.* into last_ from part p where p.task_id = _emit.task_id order by p.number desc limit 1;
  number_ := coalesce(last_.number, 0);
  if last_.attempt = _emit.attempt then
    ordinal_ := last_.ordinal;
    volume_ := last_.volume;
  elsif last_.attempt is not null then
    delete from part p where p.task_id = _emit.task_id;  -- readers never see two attempts mixed
  end if;
  known := greatest(ordinal_ + 1 - _emit.first, 0);  -- greatest() passes over a null
  if known >= jsonb_array_length(parts) then
    return true;
  end if;

  select max(e.ord)::int into progress_at
  from jsonb_array_elements(parts) with ordinality as e (element, ord)
  where e.ord > known
    and e.element ->> 'kind' = 'progress';
  if progress_at is not null then
    delete from part p where p.task_id = _emit.task_id and p.kind = 'progress';
  end if;

  insert into part (task_id, number, attempt, ordinal, volume, kind, content, created_at)
  select _emit.task_id, number_ + (e.ord - known)::int, _emit.attempt, ordinal_ + (e.ord - known)::int,
         volume_ + sum(case k.kind when 'partial' then octet_length(k.content::text) + pgpark._part_overhead() else 0 end)
                   over (order by e.ord),
         k.kind, k.content, now_
  from jsonb_array_elements(parts) with ordinality as e (element, ord)
  cross join lateral (
    select coalesce(e.element ->> 'kind', 'partial') as kind, e.element -> 'content' as content
  ) k
  where e.ord > known
    and (k.kind = 'partial' or e.ord = progress_at);

  select p.* into last_ from part p where p.task_id = _emit.task_id order by p.number desc limit 1;
  if last_.volume > pgpark._most_emitted() then
    raise exception 'task % has emitted more than % bytes in this attempt', _emit.task_id, pgpark._most_emitted()
      using errcode = '54000', hint = 'Partial results are for a reader who waits; put large output elsewhere.';
  end if;
  perform pg_notify('pgpark.task.' || _emit.task_id, last_.number::text);
  return true;
end
$$;

-- Deletes parts whose task and message are both gone without having come by _conclude and park_ack, as with a mailbox
-- that is emptied by a crash. Looks at a few tasks, from one on that is chosen at random, so it costs the same always.
create or replace function pgpark._forget_parts(bite int) returns void
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
  first_ bigint := (select min(p.task_id) from part p);
  last_ bigint;
  looked_at bigint;
begin
  if first_ is null then
    return;
  end if;
  last_ := (select max(p.task_id) from part p);
  looked_at := first_ + floor(random() * (last_ - first_ + 1))::bigint - 1;
  for look in 1 .. bite loop
    looked_at := coalesce((select min(p.task_id) from part p where p.task_id > looked_at), first_);  -- round and round
    delete from part p
    where p.task_id = looked_at
      and not exists (select from task t where t.task_id = looked_at)
      and not exists (select from mailbox m where m.task_id = looked_at);
  end loop;
end
$$;
