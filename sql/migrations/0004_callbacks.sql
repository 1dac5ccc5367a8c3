-- Callbacks: outcomes that are posted to the URL which the config of their pool names (mailbox.notifier).
--
-- pgmq queue pgpark_outbox         callbacks that wait for their delivery, each a copy of its mailbox row
-- pgmq queue pgpark_dead_letters   callbacks that were given up, under the ids they had in the outbox
-- pool.notifier                    where callbacks go and how, without the secret
-- pool_secret                      the secret, apart, so that nothing that shows a pool can show it
--
-- functions/callbacks.sql says how they are used.

do $$
begin
  if exists (select from pgmq.list_queues() q where q.queue_name in ('pgpark_outbox', 'pgpark_dead_letters')) then
    raise exception 'there is a pgmq queue pgpark_outbox or pgpark_dead_letters already; pgpark needs these names'
      using errcode = '42710', hint = 'Move what is in it to a queue of another name, and drop it.';
  end if;
  perform pgmq.create('pgpark_outbox');
  perform pgmq.create('pgpark_dead_letters');
end
$$;

-- park_callbacks, park_callbacks_due: what is due in a pool, and which pools have something waiting
create index pgpark_outbox_due on pgmq.q_pgpark_outbox ((message ->> 'pool'), vt);

alter table pgpark.pool add column notifier jsonb;

create table pgpark.pool_secret (
  pool_id     int primary key,
  auth_header text not null
);

-- Builds that were never released kept what they were given here as it was.
update pgpark.pool
set config = (config #- '{mailbox,notifier}') - 'database'
where config ? 'database'
   or config #> '{mailbox,notifier}' is not null;

-- Row types of functions that have an argument `pool` beside a column `pool` of their result.

create type pgpark.callback as (
  callback_id  bigint,
  task_id      bigint,
  pool         text,
  attempt      int,
  url          text,
  auth_header  text,
  timeout_secs double precision,
  body         jsonb
);

create type pgpark.dead_letter as (
  callback_id bigint,
  task_id     bigint,
  pool        text,
  tenant      text,
  url         text,
  attempts    int,
  http_status int,
  error       text,
  created_at  timestamptz,
  died_at     timestamptz
);

comment on column pgpark.pool.notifier is 'mailbox.notifier of the config with every default filled in, without auth_header.';
comment on table pgpark.pool_secret is 'What a pool must not show: the Authorization header of its callbacks.';
comment on type pgpark.callback is 'A row of park_callbacks. auth_header is a secret.';
comment on type pgpark.dead_letter is 'A row of park_dead_letters.';
