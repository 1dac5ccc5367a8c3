-- More of what keeps claims flat while an old snapshot is held: docs/decisions/0015.

-- When a mark was set: deadlines and starting times of what has still to commit are later. And where the walk of delayed
-- tasks begins.
alter table pgpark.mark add column marked_at timestamptz not null default 'epoch';
alter table pgpark.front add column due_to timestamptz not null default 'epoch';

-- Tasks that parked again leave dead entries too: they have numbers, a mark and a floor as the tally has.
drop index pgpark.returned_pool;
alter table pgpark.returned add column entry_id bigint generated always as identity;
create index returned_pool on pgpark.returned (pool_id, entry_id);
alter table pgpark.mark add column returned_id bigint not null default 0;
alter table pgpark.front add column returned_floor bigint not null default 0;

-- Units in use are counted by worker, so that a worker with a capacity of its own need not walk over all that runs.
alter table pgpark.tally add column worker text;

insert into pgpark.tally (pool_id, worker, units)
select t.pool_id, w.worker, case when w.worker is null then -1 else 1 end * sum(t.units)
from pgpark.task t
cross join lateral (values (t.worker), (null)) as w (worker)
where t.state in ('running', 'cancelling')
group by t.pool_id, w.worker;

comment on column pgpark.tally.worker is 'Whose units these are; null for what has no worker.';
comment on column pgpark.mark.marked_at is 'Who submits after the mark gives its tasks later times than this.';
comment on column pgpark.front.expired_to is 'No task waits with a deadline up to here.';
comment on column pgpark.front.returned_floor is 'No task that parked again has an entry up to here.';
comment on column pgpark.front.due_to is 'No delayed task has a starting time up to here.';
