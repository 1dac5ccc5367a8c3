-- What is measured: waits, runs, lost leases and callbacks beside the outcomes, and a history by minute: docs/decisions/0022.
--
-- tally     rows that functions append also say when, and how long their tasks waited and ran
-- history   what a pool did in a minute, for two days; written when the tally is folded

alter table pgpark.tally
  add column at timestamptz,
  add column waits real[],
  add column runs real[],
  add column counts bigint[],
  add column wait_secs double precision,
  add column run_secs double precision,
  add column lost bigint,
  add column delivered bigint,
  add column undelivered bigint,
  add column dead bigint;
alter table pgpark.tally
  alter column waits set storage external,
  alter column runs set storage external;

-- Since when a task waits that did not park when it was submitted.
alter table pgpark.task add column waits_since timestamptz;

create table pgpark.history (
  pool_id   int not null,
  minute    timestamptz not null,
  completed bigint not null,
  failed    bigint not null,
  expired   bigint not null,
  dropped   bigint not null,
  retried   bigint not null,
  lost      bigint not null,
  counts    bigint[] not null,
  wait_secs double precision not null,
  run_secs  double precision not null
);

-- park_history, and park_maintain where it forgets what is old
create index history_pool on pgpark.history (pool_id, minute);

-- Row types of functions that have an argument `pool` beside a column `pool` of their result.

create type pgpark.history_step as (
  pool           text,
  at             timestamptz,
  started        bigint,
  completed      bigint,
  failed         bigint,
  expired        bigint,
  dropped        bigint,
  retried        bigint,
  lost           bigint,
  wait_mean_secs double precision,
  wait_p50_secs  double precision,
  wait_p95_secs  double precision,
  run_mean_secs  double precision,
  run_p50_secs   double precision,
  run_p95_secs   double precision
);

create type pgpark.metric as (
  pool   text,
  metric text,
  labels jsonb,
  value  double precision
);

comment on table pgpark.tally is
  'What starts and ends, appended as it happens; the rows of a pool are summed, and folded once they are many.';
comment on column pgpark.tally.at is 'When; a folded row: its minute. null: folded, and of more than a minute.';
comment on column pgpark.tally.waits is 'How long each of the tasks waited that started, in seconds.';
comment on column pgpark.tally.runs is 'How long each of the attempts ran that ended, in seconds.';
comment on column pgpark.tally.counts is
  'A folded row: how many waits there were by bucket (pgpark._bounds()), then how many runs.';
comment on column pgpark.tally.wait_secs is 'A folded row: the sum of its waits.';
comment on column pgpark.tally.run_secs is 'A folded row: the sum of its runs.';
comment on column pgpark.tally.lost is 'Leases that lapsed.';
comment on column pgpark.tally.delivered is 'Callbacks that were answered with 2xx.';
comment on column pgpark.tally.undelivered is 'Attempts to deliver a callback that are to be followed by another.';
comment on column pgpark.tally.dead is 'Callbacks that became dead letters.';
comment on column pgpark.task.waits_since is
  'When it could start, if that was not when it was submitted: its run_at, or when it parked again.';
comment on table pgpark.history is
  'What a pool did by minute; several rows of a minute are added up. counts, wait_secs, run_secs: as in tally.';
comment on type pgpark.history_step is 'A row of park_history.';
comment on type pgpark.metric is 'A row of park_metrics.';
