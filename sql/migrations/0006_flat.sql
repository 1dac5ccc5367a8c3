-- What keeps the cost of a claim the same however much runs, has run, or waits: docs/decisions/0015.

-- Units in use are the sum of a ledger: what starts and what ceases to run appends a row, to the tally that counts
-- outcomes in the same way.
alter table pgpark.tally
  add column entry_id bigint generated always as identity,
  add column units bigint not null default 0;
drop index pgpark.tally_pool;
create index tally_pool on pgpark.tally (pool_id, entry_id);

insert into pgpark.tally (pool_id, units)
select t.pool_id, sum(t.units)
from pgpark.task t
where t.state in ('running', 'cancelling')
group by t.pool_id;

-- Where the walks of a pool begin. Written about once in a thousand tasks, by whoever holds the pool's lock.
create table pgpark.front (
  pool_id     int primary key,
  next_lapse  timestamptz not null default 'epoch',
  expired_to  timestamptz not null default 'epoch',
  entry_floor bigint not null default 0,
  tag_floors  double precision[] not null default '{0,0,0,0}',
  task_floors bigint[] not null default '{0,0,0,0}'
)
with (fillfactor = 20);

create table pgpark.mark (
  pool_id  int primary key,
  entry_id bigint not null default 0,
  task_id  bigint not null default 0
)
with (fillfactor = 20);

insert into pgpark.front (pool_id)
select p.pool_id from pgpark.pool p;
insert into pgpark.mark (pool_id)
select p.pool_id from pgpark.pool p;

-- Tasks that parked again, until a claim has lowered its floor to them.
create table pgpark.returned (
  pool_id int not null,
  task_id bigint not null
);

create index returned_pool on pgpark.returned (pool_id, task_id);

-- Answers whether any pool names a mailbox of its own.
create index pool_storage on pgpark.pool (mailbox_table) where mailbox_table <> 'mailbox_messages';

-- Whole queues pass through these tables, so vacuum must not wait for a fifth of what is parked to be dead.
alter table pgpark.task set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 10000);
alter table pgpark.tally set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

comment on column pgpark.tally.units is 'Units that began to be used (above 0) or ceased to be (below). Their sum is in use.';
comment on column pgpark.tally.entry_id is 'Rises with each entry: claims begin their sum at front.entry_floor.';
comment on table pgpark.front is 'Where the index walks of a pool begin: past what is dead.';
comment on column pgpark.front.next_lapse is 'No lease of this pool lapses before.';
comment on column pgpark.front.expired_to is 'No task waits with a deadline up to here, if its submit did not stay open for a minute.';
comment on column pgpark.front.entry_floor is 'The tally of this pool has no entry up to here, and will get none.';
comment on column pgpark.front.task_floors is
  'By priority: no parked task without a lane ranks before (tag_floors, task_floors), but for those in returned.';
comment on table pgpark.mark is
  'The last numbers given out before the row was written: once no transaction older than its xmin is open, all are in sight.';
comment on table pgpark.returned is 'Parked tasks that may rank before the floors of their pool.';
