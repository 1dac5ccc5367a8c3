-- Makes sure that pgmq is here and new enough: the extension where the server offers it, else the plain SQL that
-- the Python package pgmq carries. Run by `pgpark migrate` and at the head of the script of `--dump-sql`, with the
-- three {placeholders} filled in. What pgpark needs of pgmq is send_batch() with an absolute time (pgmq {required}).

do $pgpark$
declare
  required constant int[] := string_to_array('{required}', '.')::int[];
  found text := (select extversion from pg_catalog.pg_extension where extname = 'pgmq');
begin
  if found is null and to_regnamespace('pgmq') is null then
    if exists (select from pg_catalog.pg_available_extensions where name = 'pgmq') then
      create extension pgmq;
      found := (select extversion from pg_catalog.pg_extension where extname = 'pgmq');
    else
      -- pgmq {bundled}, as published
      execute $pgpark_pgmq${install_sql}$pgpark_pgmq$;
    end if;
  end if;

  if found is not null and string_to_array(substring(found from '^[0-9.]*[0-9]'), '.')::int[] < required then
    raise exception 'pgmq % is too old: pgpark needs pgmq {required} or newer', found
      using errcode = 'feature_not_supported',
            hint = 'Run: alter extension pgmq update;  (or install a newer pgmq on the server first)';
  end if;

  -- An installation from plain SQL carries no version, so look for what is needed.
  if to_regprocedure('pgmq.send_batch(text,jsonb[],jsonb[],timestamp with time zone)') is null
     or to_regprocedure('pgmq.archive(text,bigint[])') is null then
    raise exception 'the schema pgmq holds an installation older than pgmq {required}, which pgpark needs'
      using errcode = 'feature_not_supported',
            hint = 'Upgrade pgmq to {required} or newer, then run the migration again.';
  end if;
end
$pgpark$;
