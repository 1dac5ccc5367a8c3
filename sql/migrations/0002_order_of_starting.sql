-- What decides the order of starting beyond priority: fair share between tenants, their limits, and places in a full lot.
--
-- tenant           weight and limit of a tenant in a pool, as the pool's config names them
-- tenant_service   how far each tenant of a fair pool was served; written by claims alone
-- place            the free places of a pool with max_queue_depth, dealt out over rows
--
-- task.start_tag, task.share and task.lane are set when a task parks; functions/_tenants.sql says how.

alter table pgpark.pool
  add column fairness text not null default 'fifo' check (fairness in ('fifo', 'tenant')),
  add column overflow text not null default 'reject' check (overflow in ('reject', 'drop_lowest')),
  add column limited boolean not null default false;

alter table pgpark.task
  add column start_tag double precision not null default 0,
  add column share text collate "C",
  add column lane text collate "C";

drop index pgpark.task_rank;
-- park_claim, park_explain, park_status.position: parked tasks of a pool in rank order, without those in a lane
create index task_rank on pgpark.task (pool_id, priority desc, start_tag, task_id)
  where state = 'parked' and lane is null;
-- the same for each tenant that has a limit: it is passed over at its limit by passing over its lane
create index task_lane on pgpark.task (pool_id, lane, priority desc, start_tag, task_id)
  where state = 'parked' and lane is not null;
-- park_submit in a fair pool: the last parked task of a tenant
create index task_share on pgpark.task (pool_id, share, priority, start_tag, task_id)
  where state = 'parked' and share is not null;

create table pgpark.tenant (
  pool_id   int not null,
  tenant    text collate "C" not null,
  weight    double precision not null check (weight > 0),
  max_units int check (max_units >= 1),
  primary key (pool_id, tenant)
);

create table pgpark.tenant_service (
  pool_id     int not null,
  tenant      text collate "C" not null,
  priority    smallint not null,
  started_tag double precision not null,
  finish_tag  double precision not null,
  primary key (pool_id, tenant, priority)
)
with (fillfactor = 50);

-- park_submit in a fair pool: how far the pool was served, and how far at most when it falls idle
create index tenant_service_started on pgpark.tenant_service (pool_id, priority, started_tag);
create index tenant_service_finish on pgpark.tenant_service (pool_id, priority, finish_tag);

create table pgpark.place (
  place_id   bigint generated always as identity primary key,
  pool_id    int not null,
  stripe     smallint not null,
  free       int not null check (free >= 0 or stripe = 0),
  counted_at timestamptz
)
with (fillfactor = 20);

-- park_submit, and whatever takes a task out of the lot: a row of the pool that nobody else holds
create index place_stripe on pgpark.place (pool_id, stripe);

insert into pgpark.place (pool_id, stripe, free)
select p.pool_id, s.stripe,
       case when s.stripe = 0 then least(p.max_queue_depth - w.waiting, 0)
            else greatest(p.max_queue_depth - w.waiting, 0) / least(64, p.max_queue_depth)
                 + (s.stripe <= greatest(p.max_queue_depth - w.waiting, 0) % least(64, p.max_queue_depth))::int end
from pgpark.pool p
cross join lateral (
  select count(*)::int as waiting from pgpark.task t where t.pool_id = p.pool_id and t.state in ('parked', 'delayed')
) w
cross join lateral generate_series(0, least(64, p.max_queue_depth)) as s (stripe)
where p.max_queue_depth is not null;

-- A parked task as a claim looks at it.
create type pgpark.candidate as (
  task_id   bigint,
  tenant    text,
  priority  smallint,
  start_tag double precision,
  units     int,
  bypassed  int,
  deadline  timestamptz,
  max_units int,
  in_line   boolean,
  last_look boolean
);

comment on column pgpark.pool.limited is 'Whether a tenant has a limit of its own here.';
comment on column pgpark.task.start_tag is
  'Start tag of start-time fair queueing: rank within a priority. 0 in a pool that is not fair.';
comment on column pgpark.task.share is 'In a fair pool, the tenant whose share this parked task takes; '''' for none.';
comment on column pgpark.task.lane is 'The tenant of this parked task, if it has a limit in this pool.';
comment on table pgpark.tenant is 'Weight and limit in units of a tenant in a pool; '''' stands for tasks without a tenant.';
comment on table pgpark.tenant_service is 'Greatest start tag that started in order, and finish tag that started, by tenant and priority of a fair pool.';
comment on table pgpark.place is
  'Free places of a pool with max_queue_depth, dealt out over stripes; stripe 0 is what tasks owe that came back.';
comment on type pgpark.candidate is
  'A parked task; max_units: the limit of its tenant; in_line: that lets it start; last_look: its lane was read no further.';
