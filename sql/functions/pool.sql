-- Pools: made, changed, paused, dropped. Called by operators and by `pgpark pool`.
-- Keeps invariant 1 after a shrink (nothing starts until it fits again; what can never fit is dropped).

create or replace function pgpark.park_put_pool(name text, config jsonb) returns text
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  before pgpark.pool;
  after_ pgpark.pool;
  retenanted boolean;  -- who shares the pool, and how
  moved boolean;       -- to another queue
begin
  perform pgpark._require('{}', null, '{}', 'change pools');
  perform pgpark._require_read_committed();
  perform pgpark._check_pool_name(park_put_pool.name);
  perform pgpark._check_config(park_put_pool.name, park_put_pool.config);
  after_ := pgpark._configured(park_put_pool.name, park_put_pool.config);

  perform pgpark._lock_entrance(0, alone => true);  -- one pool is made, changed or dropped at a time
  select p.* into before from pool p where p.name = park_put_pool.name;
  if not found then
    perform pgpark._create_queue(after_);
    perform pgpark._create_storage(after_);
    after_.pool_id := nextval('pgpark.pool_pool_id_seq')::int;
    after_.door := pgpark._spare_door();
    after_.state := 'active';
    after_.created_at := pgpark._now();
    insert into pool overriding system value select after_.*;
    insert into front (pool_id) values (after_.pool_id);
    insert into mark (pool_id) values (after_.pool_id);
    insert into latch (pool_id, name) values (after_.pool_id, 'maintenance');
    perform pgpark._put_secret(after_, park_put_pool.config);
    perform pgpark._put_tenants(after_);
    perform pgpark._deal_places(after_, after_.created_at);
    perform pgpark._remember(after_);
    if after_.audit then
      perform pgpark._add_audit_days(pgpark._audit_day(pgpark._now()), 8);
    end if;
    return 'created';
  end if;

  after_.pool_id := before.pool_id;
  after_.door := before.door;
  after_.state := before.state;
  after_.created_at := before.created_at;
  after_.kept_in_memory := before.kept_in_memory or after_.kept_in_memory;
  if not pgpark._put_secret(after_, park_put_pool.config) and pgpark._settings(before) = pgpark._settings(after_) then
    update pool p set config = after_.config where p.pool_id = before.pool_id and p.config <> after_.config;
    return 'unchanged';
  end if;
  perform pgpark._create_storage(after_);

  moved := (before.queue_type, before.queue_name) <> (after_.queue_type, after_.queue_name);
  retenanted := before.fairness <> after_.fairness
                or before.config -> 'tenants' is distinct from after_.config -> 'tenants';
  if retenanted or moved or after_.max_units < before.max_units
     or before.max_queue_depth is distinct from after_.max_queue_depth then
    perform pgpark._lock_entrance(before.door, alone => true);
  end if;
  perform pgpark._lock_pool(park_put_pool.name);
  loop  -- what was lost in a crash must not be forgotten by the mark that is set below
    exit when pgpark._recall(before, bite => 1000) < 1000;
  end loop;
  if moved or before.mailbox_table <> after_.mailbox_table then
    -- Whoever ends a task holds its row before looking up queue and mailbox, and finds the new ones after us.
    perform from task t where t.pool_id = before.pool_id order by t.task_id for update;
  end if;
  if moved then
    perform pgpark._move_queue(before, after_);
  end if;
  update pool p
  set max_units = after_.max_units,
      max_queue_depth = after_.max_queue_depth,
      default_timeout_secs = after_.default_timeout_secs,
      resource_kind = after_.resource_kind,
      max_bypass = after_.max_bypass,
      overflow = after_.overflow,
      fairness = after_.fairness,
      limited = after_.limited,
      lease_secs = after_.lease_secs,
      run_timeout_secs = after_.run_timeout_secs,
      scheduling_slack_secs = after_.scheduling_slack_secs,
      max_attempts = after_.max_attempts,
      max_losses = after_.max_losses,
      backoff_secs = after_.backoff_secs,
      backoff_factor = after_.backoff_factor,
      max_backoff_secs = after_.max_backoff_secs,
      archive = after_.archive,
      mailbox_ttl_secs = after_.mailbox_ttl_secs,
      max_payload_kb = after_.max_payload_kb,
      notifier = after_.notifier,
      mailbox_type = after_.mailbox_type,
      mailbox_table = after_.mailbox_table,
      kept_in_memory = after_.kept_in_memory,
      queue_type = after_.queue_type,
      queue_name = after_.queue_name,
      cost_model = after_.cost_model,
      audit = after_.audit,
      audit_days = after_.audit_days,
      config = after_.config
  where p.pool_id = before.pool_id;
  if retenanted then
    perform pgpark._line_up(before, after_, pgpark._put_tenants(after_));
  end if;
  if retenanted or after_.max_units < before.max_units then
    perform pgpark._conclude_all(
      array(select t.task_id
            from task t
            where t.pool_id = before.pool_id
              and t.state in ('parked', 'delayed')
              and t.units > least(after_.max_units,
                                  (select n.max_units from tenant n
                                   where n.pool_id = t.pool_id and n.tenant = coalesce(t.tenant, '')))
            for update),
      'dropped', 'too_large');
  end if;
  if before.max_queue_depth is distinct from after_.max_queue_depth then
    perform pgpark._deal_places(after_, pgpark._now());
  end if;
  if before.mailbox_ttl_secs is distinct from after_.mailbox_ttl_secs then
    perform from mailbox m where m.pool_id = before.pool_id order by m.message_id for update;  -- in the order of park_ack
    update mailbox m
    set purge_at = m.created_at + pgpark._secs(after_.mailbox_ttl_secs)
    where m.pool_id = before.pool_id;
  end if;
  perform pgpark._reset_front(before.pool_id);
  perform pgpark._remember(after_);
  if after_.notifier is null and before.notifier is not null then
    perform pgpark._bury_all(park_put_pool.name, 'the pool has no notifier any more');
  end if;
  perform pgpark._wake(park_put_pool.name);
  if after_.audit then
    perform pgpark._add_audit_days(pgpark._audit_day(pgpark._now()), 8);
  end if;
  return 'changed';
end
$$;

comment on function pgpark.park_put_pool is
'Creates or changes a pool. config: an object as in the config file; only max_units (units, at least 1) is required, and
a key that is left out has its default. Returns created, changed or unchanged. After a shrink nothing starts until the
running tasks fit again, and waiting tasks that can never fit are dropped (reason too_large). With another queue the
payloads move there, those of running and of archived tasks too, in this transaction; with another mailbox storage
outcomes stay where they landed and are found all the same. Another mailbox.ttl_secs holds for the outcomes there are.
Secrets (mailbox.notifier.auth_header) are kept apart and shown as (secret), which, given back, keeps the one that is
stored. Without a notifier any more, callbacks that wait become dead letters.
Errors: 22023 (names the key), 42710 (a queue or table of that name exists already), 25001, 42501.';

create or replace function pgpark.park_plan_pool(name text, config jsonb)
returns table (key text, before jsonb, after jsonb)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  present pgpark.pool;
  planned pgpark.pool;
  other_secret boolean;
begin
  perform pgpark._require('{}', null, '{}', 'plan pools');
  perform pgpark._check_pool_name(park_plan_pool.name);
  perform pgpark._check_config(park_plan_pool.name, park_plan_pool.config);
  planned := pgpark._configured(park_plan_pool.name, park_plan_pool.config);
  select p.* into present from pool p where p.name = park_plan_pool.name;
  if present.name is null or pgpark._messages(present) <> pgpark._messages(planned) then
    perform pgpark._check_queue(planned);
  end if;
  perform pgpark._check_storage(planned);
  planned.pool_id := present.pool_id;
  other_secret := pgpark._other_secret(planned, park_plan_pool.config);
  return query
  select key, b.value, a.value
  from pgpark._leaves(pgpark._settings(planned)) a
  full join pgpark._leaves(case when present.name is not null then pgpark._settings(present) end) b using (key)
  where coalesce(a.value, 'null') is distinct from coalesce(b.value, 'null')
     or (key = 'mailbox.notifier.auth_header' and other_secret)  -- both are shown alike
  order by 1;
end
$$;

comment on function pgpark.park_plan_pool is
'What park_put_pool would change: a row for each setting that would be another one, as the dotted key, before and after
(before is null for a pool that is not there yet, and for what was not set). Changes nothing. Errors: 22023, 42710, 42501,
as park_put_pool.';

create or replace function pgpark.park_change_pool(name text, changes jsonb) returns text
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._require('{}', null, '{}', 'change pools');
  perform pgpark._require_read_committed();
  if jsonb_typeof(park_change_pool.changes) is distinct from 'object' then
    raise exception 'changes must be a JSON object, not %', coalesce(jsonb_typeof(park_change_pool.changes), 'NULL')
      using errcode = '22023', hint = 'For example: {"max_units": 48}';
  end if;
  perform pgpark._lock_entrance(0, alone => true);  -- what is read here must still be so when it is put
  return pgpark.park_put_pool(
    park_change_pool.name,
    pgpark._merged((pgpark._pool(park_change_pool.name)).config, park_change_pool.changes));
end
$$;

comment on function pgpark.park_change_pool is
'Changes the settings of a pool that changes names and leaves the others. changes: an object of config keys, merged into the
config as in RFC 7396: objects key by key, null takes a key away. Returns changed or unchanged. Errors: 42704 (no such pool)
and those of park_put_pool: 22023 (names the key), 42710, 25001, 42501.';

-- Two JSON values merged as in RFC 7396.
create or replace function pgpark._merged(value jsonb, changes jsonb) returns jsonb
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
declare
  kept jsonb := case jsonb_typeof(value) when 'object' then value else '{}' end;
  change record;
begin
  if jsonb_typeof(changes) is distinct from 'object' then
    return changes;
  end if;
  for change in select c.key, c.value from jsonb_each(changes) c loop
    kept := case when change.value = 'null' then kept - change.key
                 else jsonb_set(kept, array[change.key], pgpark._merged(kept -> change.key, change.value)) end;
  end loop;
  return kept;
end
$$;

create or replace function pgpark.park_set_pool_state(name text, state text) returns void
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  perform pgpark._require('{}', null, '{}', 'change pools');
  perform pgpark._require_read_committed();
  if park_set_pool_state.state in ('active', 'paused', 'draining', 'disabled') is not true then
    raise exception 'unknown state %; use active, paused, draining or disabled',
                    coalesce(pgpark._on_one_line(quote_literal(park_set_pool_state.state)), 'NULL')
      using errcode = '22023';
  end if;
  perform pgpark._lock_entrance(0, alone => true);
  lot := pgpark._pool(park_set_pool_state.name);
  if park_set_pool_state.state in ('draining', 'disabled') then
    perform pgpark._lock_entrance(lot.door, alone => true);
  end if;
  perform pgpark._lock_pool(park_set_pool_state.name);
  update pool p set state = park_set_pool_state.state where p.pool_id = lot.pool_id;
  perform pgpark._wake(lot.name);
end
$$;

comment on function pgpark.park_set_pool_state is
'Sets the state of a pool: active, paused (nothing starts), draining (nothing is accepted) or disabled (neither).
Running tasks go on in each. When it returns, no submit or claim that began before is still under way.
Errors: 22023, 42704, 25001, 42501.';

create or replace function pgpark.park_drop_pool(name text, force boolean default false) returns void
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  live bigint[];
begin
  perform pgpark._require('{}', null, '{}', 'drop pools');
  perform pgpark._require_read_committed();
  perform pgpark._lock_entrance(0, alone => true);
  lot := pgpark._pool(park_drop_pool.name);
  perform pgpark._lock_entrance(lot.door, alone => true);
  perform pgpark._lock_pool(park_drop_pool.name);
  live := array(select t.task_id from task t where t.pool_id = lot.pool_id order by t.task_id for update);
  if cardinality(live) > 0 and not coalesce(force, false) then
    raise exception 'pool % still has % live tasks', quote_literal(lot.name), cardinality(live)
      using errcode = '55006', hint = 'Drain it first, or force: then each of them is dropped.';
  end if;
  perform pgpark._conclude_all(live, 'dropped', 'pool_dropped');
  perform pgpark._bury_all(lot.name, 'the pool was dropped');
  delete from pool_secret s where s.pool_id = lot.pool_id;
  delete from worker w where w.pool_id = lot.pool_id;
  delete from tally y where y.pool_id = lot.pool_id;
  delete from history h where h.pool_id = lot.pool_id;
  delete from submission_key k where k.pool_id = lot.pool_id;
  delete from tenant n where n.pool_id = lot.pool_id;
  delete from tenant_service s where s.pool_id = lot.pool_id;
  delete from place p where p.pool_id = lot.pool_id;
  delete from memory m where m.pool_id = lot.pool_id;
  delete from front f where f.pool_id = lot.pool_id;
  delete from mark m where m.pool_id = lot.pool_id;
  delete from returned r where r.pool_id = lot.pool_id;
  delete from latch l where l.pool_id = lot.pool_id;
  delete from pool p where p.pool_id = lot.pool_id;
  perform pgpark._drop_queue(lot);
end
$$;

comment on function pgpark.park_drop_pool is
'Drops a pool with its queue and archive; outcomes in the mailbox stay. force: its live tasks end as dropped (reason
pool_dropped). Callbacks that wait become dead letters. Errors: 55006 (tasks live, not forced), 42704, 25001,
42501.';

create or replace function pgpark.park_pools(pool text default null)
returns table (name text, state text, config jsonb, settings jsonb, created_at timestamptz)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select p.name, p.state, p.config, pgpark._settings(p), p.created_at
  from pgpark._visible_pools(park_pools.pool) p
  order by p.name;
end
$$;

comment on function pgpark.park_pools is
'A row for a pool (null: for each): name, state, config as it was given, settings with every default filled in, and when
it was made. Errors: 42704, 42501.';

create or replace function pgpark._check_pool_name(name text) returns void
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
begin
  if _check_pool_name.name ~ '^[a-z0-9_]{1,40}$' is not true then
    raise exception 'pool name % is not possible',
                    coalesce(pgpark._on_one_line(quote_literal(_check_pool_name.name)), 'NULL')
      using errcode = '22023', hint = 'Use 1 to 40 lower-case letters, digits and _.';
  end if;
end
$$;

-- Writes the tenants of a checked config. Returns those whose weight is another one than before.
create or replace function pgpark._put_tenants(lot pgpark.pool) returns text[]
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  reweighted text[];
begin
  select array_agg(tenant order by tenant) into reweighted
  from (select n.tenant, n.weight from tenant n where n.pool_id = lot.pool_id) b
  full join pgpark._tenants(lot.config) a using (tenant)
  where coalesce(b.weight, 1) <> coalesce(a.weight, 1);
  delete from tenant n where n.pool_id = lot.pool_id;
  insert into tenant (pool_id, tenant, weight, max_units)
  select lot.pool_id, a.tenant, a.weight, a.max_units from pgpark._tenants(lot.config) a;
  return coalesce(reweighted, '{}');
end
$$;
