-- Locks that nobody outside can take: anybody who can connect may hold any advisory lock, so none is used here.
-- docs/decisions/0002, 0016.

-- The entrance of a pool is the lock of an empty table, its door. Submitters hold it shared until they commit; who closes,
-- shrinks or drops the pool holds it alone, and so sees every task that was accepted before. Behind door 0, pools are made,
-- changed and dropped one at a time. A lock on the pool's row would do the same but writes to it at each submit.
create or replace function pgpark._lock_entrance(door int, alone boolean) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  execute format('lock table pgpark.door_%s in %s mode', door, case when alone then 'exclusive' else 'row share' end);
end
$$;

-- A door that no pool has, made if there is none. The caller holds door 0 alone.
create or replace function pgpark._spare_door() returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
declare
  door int := (
    select min(n.door)::int
    from generate_series(1, (select count(*) + 1 from pool)) as n (door)
    where not exists (select from pool p where p.door = n.door));
begin
  if to_regclass('pgpark.door_' || door) is null then
    execute format('create table pgpark.door_%s ()', door);
    execute format('comment on table pgpark.door_%s is %L', door, 'Its lock is the entrance of a pool.');
  end if;
  return door;
end
$$;

-- Waits until nobody else holds this latch of a pool, and holds it until the transaction ends. A latch is a row that is
-- only locked; it is made when it is first wanted, and again after a crash, which empties the table.
create or replace function pgpark._latch(pool_id int, name text) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  loop
    perform from latch l where l.pool_id = _latch.pool_id and l.name = _latch.name for update;
    exit when found;
    insert into latch (pool_id, name) values (_latch.pool_id, _latch.name) on conflict do nothing;
  end loop;
end
$$;

-- The same without waiting: false when somebody else holds it. It may wait for who makes the latch anew after a crash.
create or replace function pgpark._try_latch(pool_id int, name text) returns boolean
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform from latch l where l.pool_id = _try_latch.pool_id and l.name = _try_latch.name for update skip locked;
  if not found and not exists (
    select from latch l where l.pool_id = _try_latch.pool_id and l.name = _try_latch.name
  ) then
    insert into latch (pool_id, name) values (_try_latch.pool_id, _try_latch.name) on conflict do nothing;
  end if;
  return found;
end
$$;
