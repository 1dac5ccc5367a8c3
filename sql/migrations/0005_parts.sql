-- What a running task tells before it ends: partial results, such as tokens, and progress.
--
-- part      what was emitted and is kept: the parts of one attempt of a task, for as long as the task or its message lives
--
-- task.emitted and mailbox.emitted say whether there are any, so that tasks without parts pay nothing for them.

alter table pgpark.task add column emitted int not null default 0;
alter table pgpark.mailbox add column emitted int not null default 0;

create table pgpark.part (
  task_id    bigint not null,
  number     int not null,
  attempt    int not null,
  ordinal    int not null,
  volume     bigint not null,
  kind       text not null check (kind in ('partial', 'progress')),
  content    jsonb not null,
  created_at timestamptz not null,
  primary key (task_id, number)  -- park_parts; the last one in park_emit
);

-- park_emit: the progress of a task that later progress replaces
create index part_progress on pgpark.part (task_id) where kind = 'progress';

create type pgpark.task_part as (
  task_id    bigint,
  number     int,
  attempt    int,
  kind       text,
  content    jsonb,
  created_at timestamptz
);

comment on table pgpark.part is
  'What tasks emitted while they ran. The parts of a task are of one attempt: the last that emitted.';
comment on column pgpark.part.number is
  'Rises over all attempts of a task. The last part is always kept, so the next number is the one after it.';
comment on column pgpark.part.ordinal is 'How many parts its attempt had emitted with it, replaced ones included.';
comment on column pgpark.part.volume is
  'Bytes that the partial results of its attempt take up to here, with what a row costs; park_emit bounds it.';
comment on column pgpark.task.emitted is 'The last attempt that emitted parts; 0: none did.';
comment on column pgpark.mailbox.emitted is 'The attempt whose parts are kept with this message; 0: there are none.';
comment on type pgpark.task_part is 'A row of park_parts.';
