-- What happened to each task of the pools that want it written down: docs/decisions/0024.
--
-- audit          an event a row, in partitions by day (UTC) that functions/_audit.sql makes and drops
-- audit_rest     the partition for what no day is there for
-- audit_upkeep   one row: when to look again whether days have to be made or dropped

alter table pgpark.pool
  add column audit boolean not null default false,
  add column audit_days int check (audit_days >= 1);

create sequence pgpark.audit_event_id;

create table pgpark.audit (
  event_id bigint not null default nextval('pgpark.audit_event_id'),
  at       timestamptz not null,
  event    text collate "C" not null,
  pool     text collate "C" not null,
  task_id  bigint,
  attempt  int,
  worker   text,
  tenant   text collate "C",
  priority smallint,
  units    int,
  reason   text,
  primary key (at, event_id)  -- park_audit for a period; retention in audit_rest
) partition by range (at);

alter sequence pgpark.audit_event_id owned by pgpark.audit.event_id;

-- park_audit for a task
create index audit_task on pgpark.audit (task_id) where task_id is not null;
-- park_audit for a tenant, and a period
create index audit_tenant on pgpark.audit (tenant, at, event_id) where tenant is not null;
-- park_audit for a pool, and a period
create index audit_pool on pgpark.audit (pool, at, event_id);
-- park_audit for what goes wrong in a pool: few among many
create index audit_trouble on pgpark.audit (pool, event, at, event_id)
  where event in ('failed', 'retried', 'expired', 'dropped', 'rejected', 'released', 'lost', 'cancelling');

create table pgpark.audit_rest partition of pgpark.audit default;

create table pgpark.audit_upkeep (
  next_look timestamptz not null
);

insert into pgpark.audit_upkeep values ('epoch');

create type pgpark.audit_event as (
  event_id bigint,
  at       timestamptz,
  event    text,
  pool     text,
  task_id  bigint,
  attempt  int,
  worker   text,
  tenant   text,
  priority text,
  units    int,
  reason   text
);

comment on column pgpark.pool.audit is 'Whether what happens to tasks of this pool is written to the audit.';
comment on column pgpark.pool.audit_days is
  'Days that events are kept; null: 30 if the pool has an audit. The audit is kept as long as any pool wants it.';
comment on table pgpark.audit is 'One row per event of a task, in pools with audit: true. No payloads, no results.';
comment on table pgpark.audit_rest is 'Events of days that no partition was made for in time.';
comment on table pgpark.audit_upkeep is 'When to look again whether partitions of the audit have to be made or dropped.';
comment on column pgpark.audit.event_id is 'Rises in the order of writing, which is not that of committing.';
comment on column pgpark.audit.at is 'When it happened; it is seen once its transaction has committed.';
comment on type pgpark.audit_event is 'A row of park_audit.';
