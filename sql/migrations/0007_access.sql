-- Who may do what, how large a payload may be, and locks that a stranger cannot take: docs/decisions/0016, 0017.
--
-- access    what each role that is not the owner may do; written by park_grant
-- latch     a row for each thing that only one may do at a time; unlogged, because only its locks count

create table pgpark.access (
  role    regrole not null,
  kind    text not null check (kind in ('producer', 'worker', 'reader', 'admin')),
  tenants text[] check (cardinality(tenants) > 0),
  pools   text[] check (cardinality(pools) > 0),
  primary key (role, kind),
  check (tenants is null or kind = 'producer'),
  check (pools is null or kind <> 'admin')
);

create unlogged table pgpark.latch (
  pool_id int not null,
  name    text collate "C" not null,
  primary key (pool_id, name)
);

insert into pgpark.latch (pool_id, name)
select p.pool_id, 'maintenance' from pgpark.pool p
union all
select 0, 'maintenance';

-- A door is an empty table, pgpark.door_N, that nobody reads: its lock is the entrance of a pool. They are never dropped:
-- the door of a dropped pool is given to the next one.
create table pgpark.door_0 ();

alter table pgpark.pool
  add column door int,
  add column max_payload_kb int check (max_payload_kb >= 1);

update pgpark.pool p
set door = n.door
from (select q.pool_id, row_number() over (order by q.pool_id) as door from pgpark.pool q) n
where n.pool_id = p.pool_id;

do $$
declare
  door int;
begin
  for door in select p.door from pgpark.pool p loop
    execute format('create table pgpark.door_%s ()', door);
    execute format('comment on table pgpark.door_%s is %L', door, 'Its lock is the entrance of a pool.');
  end loop;
end
$$;

alter table pgpark.pool
  alter column door set not null,
  add constraint pool_door unique (door);

-- Answers whether any pool names a mailbox of its own, or limits results.
drop index pgpark.pool_storage;
create index pool_storage on pgpark.pool (mailbox_table)
  where mailbox_table <> 'mailbox_messages' or max_payload_kb is not null;

-- Keys are the tenant's own: another tenant's key is neither taken nor told.
alter table pgpark.submission_key add column tenant text collate "C" not null default '';

update pgpark.submission_key k
set tenant = coalesce((select t.tenant from pgpark.task t where t.task_id = k.task_id),
                      (select m.tenant from pgpark.mailbox m where m.task_id = k.task_id), '');

alter table pgpark.submission_key
  drop constraint submission_key_pkey,
  add primary key (pool_id, tenant, idempotency_key);

comment on table pgpark.access is 'What a role may do: one row for each kind of access. Null tenants or pools: any.';
comment on table pgpark.latch is 'Rows that are only locked: whoever holds one is the only one to do what it is named after.';
comment on table pgpark.door_0 is 'Its lock is held while a pool is made, changed or dropped.';
comment on column pgpark.pool.door is 'The table pgpark.door_N whose lock is the entrance of this pool.';
comment on column pgpark.pool.max_payload_kb is 'The most KiB of JSON text that a payload or a result may take; null: any.';
comment on column pgpark.submission_key.tenant is 'Whose key this is; '''' for tasks without a tenant.';
