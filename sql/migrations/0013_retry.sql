-- What an ended task needs to be submitted once more, and what shows why tasks of a pool failed: functions/retry.sql, lot.sql.

alter table pgpark.mailbox add column msg_id bigint;

-- park_lot: the latest outcomes of a pool that did not complete
create index mailbox_failed on pgpark.mailbox (pool_id, message_id) where status <> 'completed';

-- The row of park_retry: that of park_submit, whose `task_id` is an argument here.
create type pgpark.submission as (
  task_id  bigint,
  accepted boolean,
  status   text,
  reason   text
);

-- An outcome as park_lot looks at it: without the result, which may be large.
create type pgpark.ended as (
  message_id   bigint,
  task_id      bigint,
  pool_id      int,
  tenant       text,
  status       text,
  reason       text,
  priority     smallint,
  units        int,
  attempt      int,
  submitted_at timestamptz,
  started_at   timestamptz,
  created_at   timestamptz,
  msg_id       bigint
);

comment on column pgpark.mailbox.msg_id is
  'The message of this task in the queue of its pool, or in its archive; null for what ended before this was kept.';
comment on type pgpark.submission is 'A row of park_retry.';
comment on type pgpark.ended is 'An outcome without its result.';
