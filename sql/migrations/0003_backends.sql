-- Where payloads and outcomes are kept: more kinds of queues, and a mailbox in parts that pools choose by name.
--
-- mailbox   is partitioned now, by the name of the table that keeps a message; each partition is logged or unlogged
-- memory    a mark for each pool that keeps something unlogged; a crash takes the mark with what was kept

alter table pgpark.pool
  drop constraint pool_queue_type_check,
  drop constraint pool_queue_name_check,
  drop constraint pool_queue_name_key,
  add constraint pool_queue_type_check check (queue_type in ('in_memory', 'postgres_custom', 'postgres_pgmq', 'yaque')),
  add column mailbox_type text not null default 'postgres' check (mailbox_type in ('in_memory', 'postgres')),
  add column mailbox_table text not null default 'mailbox_messages',
  add column kept_in_memory boolean not null default false;

update pgpark.pool set kept_in_memory = true where queue_type = 'in_memory';

-- No two pools share a queue: those of pgmq have names of their own, and so have plain tables.
create unique index pool_queue on pgpark.pool ((queue_type = 'postgres_custom'), queue_name);

-- The mailbox so far becomes the first partition. Its numbering goes on as a plain sequence, because partitions take
-- no identity columns before PostgreSQL 17. That there is one outcome per task follows from the ledger (a task is
-- deleted there once); an index can say so only within a partition.
alter table pgpark.mailbox rename to mailbox_messages;
alter index pgpark.mailbox_pkey rename to mailbox_messages_pkey;
alter index pgpark.mailbox_task_id_key rename to mailbox_messages_task_id_key;
alter index pgpark.mailbox_tenant rename to mailbox_messages_tenant;
alter index pgpark.mailbox_user rename to mailbox_messages_user;
alter index pgpark.mailbox_purge rename to mailbox_messages_purge;

do $$
declare
  next_id bigint := nextval(pg_get_serial_sequence('pgpark.mailbox_messages', 'message_id'));
begin
  alter table pgpark.mailbox_messages alter column message_id drop identity;
  execute format('create sequence pgpark.mailbox_message_id start with %s', next_id);
end
$$;

alter table pgpark.mailbox_messages
  alter column message_id set default nextval('pgpark.mailbox_message_id'),
  add column storage text not null default 'mailbox_messages';

create table pgpark.mailbox (like pgpark.mailbox_messages including constraints including defaults including comments)
  partition by list (storage);
alter table pgpark.mailbox alter column storage drop default;
alter sequence pgpark.mailbox_message_id owned by pgpark.mailbox.message_id;

alter table pgpark.mailbox_messages
  alter column storage drop default,
  add constraint mailbox_messages_here check (storage = 'mailbox_messages');  -- so that attaching need not look
alter table pgpark.mailbox attach partition pgpark.mailbox_messages for values in ('mailbox_messages');

-- park_fetch for a whole tenant
create index mailbox_tenant on pgpark.mailbox (tenant, message_id) where tenant is not null;
-- park_fetch for one user, or one session of a user
create index mailbox_user on pgpark.mailbox (tenant, user_id, session_id, message_id)
  where tenant is not null and user_id is not null;
-- park_maintain: outcomes that were kept long enough
create index mailbox_purge on pgpark.mailbox (purge_at) where purge_at is not null;

create unlogged table pgpark.memory (
  pool_id int primary key
);

insert into pgpark.memory (pool_id)
select p.pool_id from pgpark.pool p where p.kept_in_memory;

comment on column pgpark.pool.queue_name is 'The pgmq queue with the payloads; for postgres_custom the plain table.';
comment on column pgpark.pool.kept_in_memory is
  'Whether the pool ever kept something unlogged: outcomes stay where they landed when it names another storage.';
comment on column pgpark.pool.mailbox_table is 'The partition of mailbox that outcomes of this pool go to.';
comment on table pgpark.mailbox is
  'One row per ended task: its outcome, kept until acknowledged or purged. Each partition is a table that pools named.';
comment on table pgpark.mailbox_messages is 'Outcomes of pools that name no other mailbox storage.';
comment on column pgpark.mailbox.storage is 'The name of the partition.';
comment on table pgpark.memory is 'Unlogged: a mark for each pool that keeps something unlogged, lost with it in a crash.';
