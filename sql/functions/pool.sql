-- Pools: made, changed, paused, dropped. Called by operators and by `pgpark pool`.
-- Keeps invariant 1 after a shrink (nothing starts until it fits again; what can never fit is dropped).

create or replace function pgpark.park_put_pool(name text, config jsonb) returns text
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  before pgpark.pool;
  after_ pgpark.pool;
  retenanted boolean;  -- who shares the pool, and how
begin
  perform pgpark._require_read_committed();
  perform pgpark._check_pool_name(park_put_pool.name);
  perform pgpark._check_config(park_put_pool.name, park_put_pool.config);
  after_ := pgpark._configured(park_put_pool.name, park_put_pool.config);

  perform pgpark._lock_entrance(0, alone => true);  -- one pool is made, changed or dropped at a time
  select p.* into before from pool p where p.name = park_put_pool.name;
  if not found then
    perform pgpark._create_queue(park_put_pool.name, after_.queue_type, after_.queue_name);
    after_.pool_id := nextval('pgpark.pool_pool_id_seq')::int;
    after_.state := 'active';
    after_.created_at := pgpark._now();
    insert into pool overriding system value select after_.*;
    perform pgpark._put_secret(after_, park_put_pool.config);
    perform pgpark._put_tenants(after_);
    perform pgpark._deal_places(after_, after_.created_at);
    return 'created';
  end if;

  if (before.queue_type, before.queue_name) <> (after_.queue_type, after_.queue_name) then
    raise exception 'pools.%.queue: a pool keeps the queue it was made with (% %), this version cannot move it to % %',
                    park_put_pool.name, before.queue_type, before.queue_name, after_.queue_type, after_.queue_name
      using errcode = '22023', hint = 'Leave queue as it was, or drop the pool and make it anew.';
  end if;
  after_.pool_id := before.pool_id;
  after_.state := before.state;
  after_.created_at := before.created_at;
  if not pgpark._put_secret(after_, park_put_pool.config) and before = after_ then
    return 'unchanged';
  end if;
  retenanted := before.fairness <> after_.fairness
                or before.config -> 'tenants' is distinct from after_.config -> 'tenants';
  if retenanted or after_.max_units < before.max_units
     or before.max_queue_depth is distinct from after_.max_queue_depth then
    perform pgpark._lock_entrance(before.pool_id, alone => true);
  end if;
  perform pgpark._lock_pool(park_put_pool.name);
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
      notifier = after_.notifier,
      cost_model = after_.cost_model,
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
  if after_.notifier is null and before.notifier is not null then
    perform pgpark._bury_all(park_put_pool.name, 'the pool has no notifier any more');
  end if;
  perform pgpark._wake(park_put_pool.name);
  return 'changed';
end
$$;

comment on function pgpark.park_put_pool is
'Creates or changes a pool. config: an object as in the config file; only max_units (units, at least 1) is required, and
a key that is left out has its default. Returns created, changed or unchanged. After a shrink nothing starts until the
running tasks fit again, and waiting tasks that can never fit are dropped (reason too_large). Secrets
(mailbox.notifier.auth_header) are kept apart and shown as (secret), which, given back, keeps the one that is stored.
Without a notifier any more, callbacks that wait become dead letters.
Errors: 22023 (names the key), 42710 (a pgmq queue of that name exists already), 25001.';

create or replace function pgpark.park_set_pool_state(name text, state text) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  perform pgpark._require_read_committed();
  if park_set_pool_state.state in ('active', 'paused', 'draining', 'disabled') is not true then
    raise exception 'unknown state %; use active, paused, draining or disabled',
                    coalesce(quote_literal(park_set_pool_state.state), 'NULL')
      using errcode = '22023';
  end if;
  perform pgpark._lock_entrance(0, alone => true);
  lot := pgpark._pool(park_set_pool_state.name);
  if park_set_pool_state.state in ('draining', 'disabled') then
    perform pgpark._lock_entrance(lot.pool_id, alone => true);
  end if;
  perform pgpark._lock_pool(park_set_pool_state.name);
  update pool p set state = park_set_pool_state.state where p.pool_id = lot.pool_id;
  perform pgpark._wake(lot.name);
end
$$;

comment on function pgpark.park_set_pool_state is
'Sets the state of a pool: active, paused (nothing starts), draining (nothing is accepted) or disabled (neither).
Running tasks go on in each. When it returns, no submit or claim that began before is still under way.
Errors: 22023, 42704, 25001.';

create or replace function pgpark.park_drop_pool(name text, force boolean default false) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  live bigint[];
begin
  perform pgpark._require_read_committed();
  perform pgpark._lock_entrance(0, alone => true);
  lot := pgpark._pool(park_drop_pool.name);
  perform pgpark._lock_entrance(lot.pool_id, alone => true);
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
  delete from submission_key k where k.pool_id = lot.pool_id;
  delete from tenant n where n.pool_id = lot.pool_id;
  delete from tenant_service s where s.pool_id = lot.pool_id;
  delete from place p where p.pool_id = lot.pool_id;
  delete from pool p where p.pool_id = lot.pool_id;
  perform pgmq.drop_queue(lot.queue_name);
end
$$;

comment on function pgpark.park_drop_pool is
'Drops a pool with its queue and archive; outcomes in the mailbox stay. force: its live tasks end as dropped (reason
pool_dropped). Callbacks that wait become dead letters. Errors: 55006 (tasks live, not forced), 42704, 25001.';

create or replace function pgpark.park_pools(pool text default null)
returns table (name text, state text, config jsonb, settings jsonb, created_at timestamptz)
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select p.name, p.state, p.config,
         jsonb_build_object(
           'max_units', p.max_units, 'max_queue_depth', p.max_queue_depth,
           'default_timeout_secs', p.default_timeout_secs, 'resource_kind', p.resource_kind,
           'max_bypass', p.max_bypass, 'overflow', p.overflow, 'fairness', p.fairness,
           'tenants', pgpark._tenants(p.pool_id), 'lease_secs', p.lease_secs,
           'run_timeout_secs', p.run_timeout_secs, 'scheduling_slack_secs', p.scheduling_slack_secs,
           'retry', jsonb_build_object(
             'max_attempts', p.max_attempts, 'max_losses', p.max_losses, 'backoff_secs', p.backoff_secs,
             'backoff_factor', p.backoff_factor, 'max_backoff_secs', p.max_backoff_secs),
           'archive', p.archive, 'mailbox', jsonb_build_object(
             'ttl_secs', p.mailbox_ttl_secs, 'notifier', pgpark._shown_notifier(p)),
           'cost_model', p.cost_model, 'queue', jsonb_build_object('type', p.queue_type, 'queue_name', p.queue_name)),
         p.created_at
  from pgpark._pools(park_pools.pool) p
  order by p.name;
end
$$;

comment on function pgpark.park_pools is
'A row for a pool (null: for each): name, state, config as it was given, settings with every default filled in, and when
it was made. Errors: 42704.';

create or replace function pgpark._check_pool_name(name text) returns void
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
begin
  if _check_pool_name.name ~ '^[a-z0-9_]{1,40}$' is not true then
    raise exception 'pool name % is not possible', coalesce(quote_literal(_check_pool_name.name), 'NULL')
      using errcode = '22023', hint = 'Use 1 to 40 lower-case letters, digits and _.';
  end if;
end
$$;

-- The tenants of a pool as a config has them, defaults filled in.
create or replace function pgpark._tenants(pool_id int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (
    select coalesce(jsonb_object_agg(n.tenant, jsonb_build_object('weight', n.weight, 'max_units', n.max_units)), '{}')
    from tenant n
    where n.pool_id = _tenants.pool_id);
end
$$;

-- Writes the tenants of a checked config. Returns those whose weight is another one than before.
create or replace function pgpark._put_tenants(lot pgpark.pool) returns text[]
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  before jsonb := pgpark._tenants(lot.pool_id);
  after_ jsonb;
begin
  delete from tenant n where n.pool_id = lot.pool_id;
  insert into tenant (pool_id, tenant, weight, max_units)
  select lot.pool_id, e.key, coalesce(e.value ->> 'weight', '1')::double precision,
         (e.value ->> 'max_units')::numeric::int
  from jsonb_each(nullif(lot.config -> 'tenants', 'null')) e
  where e.value <> 'null';
  after_ := pgpark._tenants(lot.pool_id);
  return array(
    select k.tenant
    from (select jsonb_object_keys(before) union select jsonb_object_keys(after_)) k (tenant)
    where coalesce(before #>> array[k.tenant, 'weight'], '1') <> coalesce(after_ #>> array[k.tenant, 'weight'], '1'));
end
$$;
