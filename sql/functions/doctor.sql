-- What is wrong with an installation, and the SQL that mends it. Called by operators, monitors and `pgpark doctor`, which adds
-- what only a client can see. Changes nothing, and takes no lock that anybody waits for.

create or replace function pgpark.park_doctor() returns setof pgpark.finding
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  installed constant text := (select e.extversion from pg_extension e where e.extname = 'pgmq');
  offered constant text := (select e.default_version from pg_available_extensions e where e.name = 'pgmq');
  amiss finding[];
begin
  perform pgpark._require('{}', null, '{}', 'see what is wrong');
  amiss := array(select w from pgpark._wrong_pgmq(installed, offered) w) || array(select d from pgpark._drift() d);
  return query select * from unnest(amiss);
  begin
    return query select * from pgpark._wrong_rights();
    return query select * from pgpark._invalid_indexes();
    return query select * from pgpark._vacuum_lag();
    return query select * from pgpark._held_horizon(interval '15 minutes', 1000000);
    return query select * from pgpark._notification_queue();
    return query select * from pgpark._overdue(pgpark._now() - interval '30 seconds');
    return query select * from pgpark._audit_lag(pgpark._now());
    return query select * from pgpark._wrong_accounts();
    return query select s.* from pool p cross join lateral pgpark._stray_messages(p) s order by p.name;
  exception
    when undefined_function or undefined_table or undefined_column then
      if cardinality(amiss) = 0 then
        raise;
      end if;  -- else it was said what is missing; the rest can be looked at when that is there again
  end;
end
$$;

comment on function pgpark.park_doctor is
'A row for each thing that is wrong, none when all is well: problem (a few words that stay the same), subject, detail, mend
(SQL that mends it, statements that end with a semicolon, each to be run in a transaction of its own; null: no SQL does) and
disruptive (mend ends a session or a transaction of somebody else''s: look first).
Changes nothing. Looks at each live task and each message a few times, so it takes a while where millions wait. Sessions of
other roles are seen only if the owner of the schema may (pg_read_all_stats). Errors: 42501.';
