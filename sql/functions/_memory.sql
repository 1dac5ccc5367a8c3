-- What is kept unlogged, and what becomes of it: the queue of a pool with queue.type in_memory, and the outcomes of one
-- with mailbox.storage.type in_memory. A crash of Postgres (or a failover, or a restore) empties both; the ledger,
-- which is logged, then still names tasks whose payloads are gone. None of them vanishes: each ends as dropped, reason
-- `payload lost`. Keeps invariant 2.

-- Raises 42710 where the name of a pool's part of the mailbox is taken by something else.
create or replace function pgpark._check_storage(lot pgpark.pool) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if (lot.mailbox_table = 'mailbox_in_memory' and lot.mailbox_type <> 'in_memory') or exists (
    select from pg_class c
    where c.oid = to_regclass(format('pgpark.%I', lot.mailbox_table))
      and ((c.relpersistence = 'u') <> (lot.mailbox_type = 'in_memory')
           or not exists (select from pg_inherits i
                          where i.inhrelid = c.oid and i.inhparent = 'pgpark.mailbox'::regclass))) then
    raise exception 'pools.%.mailbox.storage.table: there is something else named % in the schema pgpark', lot.name,
                    quote_literal(lot.mailbox_table)
      using errcode = '42710', hint = 'Name another table; several pools may share one.';
  end if;
end
$$;

-- Makes the part of the mailbox that a pool names, if it is not there yet. It is attached, not created in its place:
-- that would keep everybody out of the whole mailbox until this transaction ends.
create or replace function pgpark._create_storage(lot pgpark.pool) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  perform pgpark._check_storage(lot);
  if to_regclass(format('pgpark.%I', lot.mailbox_table)) is null then
    execute format('create %s table pgpark.%I (like pgpark.mailbox including defaults including constraints '
                   'including comments, primary key (message_id), unique (task_id))',
                   case lot.mailbox_type when 'in_memory' then 'unlogged' else '' end, lot.mailbox_table);
    execute format('alter table pgpark.mailbox attach partition pgpark.%I for values in (%L)', lot.mailbox_table,
                   lot.mailbox_table);
  end if;
end
$$;

-- Marks that what this pool keeps unlogged is there.
create or replace function pgpark._remember(lot pgpark.pool) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  if lot.kept_in_memory then
    insert into memory (pool_id) values (lot.pool_id) on conflict do nothing;
  end if;
end
$$;

-- After a crash: forgets the idempotency keys whose outcomes are gone, ends a bite of the waiting tasks whose payloads
-- are, and returns how many those were. When there are no more, marks the pool again.
create or replace function pgpark._recall(pool pgpark.pool, bite int) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  lost bigint[] := array[]::bigint[];
begin
  if not pool.kept_in_memory or exists (select from memory m where m.pool_id = pool.pool_id) then
    return 0;
  end if;
  perform pgpark._lock_entrance(pool.door, alone => false);  -- it is neither moved nor dropped from here on
  select p.* into lot from pool p where p.pool_id = _recall.pool.pool_id;
  if not found then
    return 0;
  end if;
  delete from submission_key k
  where k.pool_id = lot.pool_id
    and not exists (select from task t where t.task_id = k.task_id)
    and not exists (select from mailbox m where m.task_id = k.task_id);
  if lot.queue_type = 'in_memory' then
    execute format('select array(select t.task_id from pgpark.task t '
                   'where t.pool_id = $1 and t.state in (''parked'', ''delayed'') '
                   'and not exists (select from %s m where m.msg_id = t.msg_id) '
                   'limit $2 for update of t skip locked)', pgpark._messages(lot))
    into lost
    using lot.pool_id, bite;
    perform pgpark._conclude_all(lost, 'dropped', 'payload lost');
  end if;
  if cardinality(lost) < bite then
    perform pgpark._remember(lot);
  end if;
  return cardinality(lost);
end
$$;
