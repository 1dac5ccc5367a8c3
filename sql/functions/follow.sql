-- Following a mailbox: outcomes as they land, each once, by readers that come and go and may not acknowledge.
--
-- Messages are numbered before they are committed, so a lower number may be seen after a higher one, and "all above the
-- highest that I have seen" would lose it. A reader therefore keeps a bookmark, FLOOR.HIGHEST.HORIZON.SEEN,...: all up to
-- FLOOR is settled; SEEN are those above it that it has got, HIGHEST the last of them; once every transaction below
-- HORIZON is over, all up to HIGHEST is settled, too. HORIZON is a transaction number that is taken after looking, and so
-- above those of all who had taken a number by then: to end a task they write first.
--
-- A bookmark travels in a header, so SEEN must end somewhere. When it gets long, a transaction that is open is looked at
-- more closely: one that has not written to the mailbox holds up nothing. Behind one that has, a reader waits.

create or replace function pgpark.park_follow(
  tenant text,
  bookmark text default null,
  user_id text default null,
  session_id text default null,
  since timestamptz default null,
  pool text default null,
  max_messages int default 50)
returns setof pgpark.followed
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  most_seen constant int := 200;  -- in a bookmark, which travels in a header
  given constant text[] := string_to_array(coalesce(park_follow.bookmark, '0.0.0.'), '.');
  floor_ bigint;
  highest bigint;
  horizon xid8;
  settled boolean;
  settled_to bigint;
  seen bigint[];
  found_ pgpark.followed;
begin
  if coalesce(park_follow.bookmark, '0.0.0.') !~ '^[0-9]{1,18}[.][0-9]{1,18}[.][0-9]{1,18}[.]([0-9]{1,18}(,[0-9]{1,18}){0,199})?$' then
    raise exception 'bookmark % is none that park_follow gave', pgpark._on_one_line(quote_literal(park_follow.bookmark))
      using errcode = '22023';
  end if;
  perform pgpark._require_read_committed();
  floor_ := given[1]::bigint;
  highest := given[2]::bigint;
  horizon := given[3]::bigint::text::xid8;  -- which by itself would read 010 as eight
  seen := string_to_array(nullif(given[4], ''), ',')::bigint[];
  seen := coalesce(seen, '{}');
  settled := pg_snapshot_xmin(pg_current_snapshot()) >= horizon  -- then all up to highest is there to be seen
             or (cardinality(seen) >= most_seen / 2 and pgpark._outcomes_in_sight(horizon));
  settled_to := highest;
  horizon := null;
  for found_ in
    select m.*, null::text
    from pgpark._fetch(park_follow.pool, park_follow.tenant, park_follow.user_id, park_follow.session_id,
                       park_follow.since, floor_, max_messages + cardinality(seen)) m
  loop
    continue when found_.message_id = any (seen);
    if settled then
      floor_ := greatest(floor_, least(found_.message_id, settled_to));
      seen := array(select s from unnest(seen) s where s > floor_ order by s);
    end if;
    if found_.message_id > floor_ then
      exit when cardinality(seen) >= most_seen;
      seen := seen || found_.message_id;
    end if;
    highest := greatest(highest, found_.message_id);
    horizon := coalesce(horizon, pg_current_xact_id());
    found_.bookmark := format('%s.%s.%s.%s', floor_, highest, horizon, array_to_string(seen, ','));
    return next found_;
  end loop;
end
$$;

comment on function pgpark.park_follow is
'As park_fetch, but only what the caller has not been given yet: bookmark is that of the last row it got (null: none, then
all that is kept). Returns the columns of park_fetch and the bookmark to go on from. Nothing is taken out of the mailbox. To
follow it live, LISTEN "pgpark.mailbox" first, then call again whenever an outcome lands, and now and then. A message that is
committed later than one with a greater number is not lost: while a transaction is open that has ended tasks or
acknowledged messages, no more than 200 of those that were numbered after it did are returned; the others follow when
it is over.
Errors: 22023, 25001, 42501.';

-- Whether no transaction below horizon can still commit a message that was numbered before horizon was taken, although some
-- are open. Such a one has written to the mailbox, and holds the lock on it to its end. The locks are looked at after the
-- snapshot was taken: who is open in that, lives on, and has no lock even now, has numbered nothing. Who is open in the
-- snapshot and gone by now may have; the next look sees what it has left.
create or replace function pgpark._outcomes_in_sight(horizon xid8) returns boolean
language sql stable
set search_path = pgpark, pg_temp
set jit = off
as $$
  with lock_ as materialized (  -- once, so that all are of one moment
    select l.virtualtransaction as holder, l.locktype, l.transactionid,
           l.locktype = 'relation'
             and l.relation = 'pgpark.mailbox'::regclass
             and l.database = (select d.oid from pg_database d where d.datname = current_database())
             and l.mode not in ('AccessShareLock', 'RowShareLock') as on_mailbox
    from pg_locks l
    where l.granted
  )
  select not exists (
    select from pg_snapshot_xip(pg_current_snapshot()) as o (xid)
    where o.xid < horizon
      and not exists (
        select from lock_ l
        where l.locktype = 'transactionid'
          and l.transactionid = o.xid::xid
          and not exists (select from lock_ m where m.holder = l.holder and m.on_mailbox)));
$$;
