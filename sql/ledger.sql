-- The ledger of what was applied to this database: one row per file of sql/migrations and sql/functions.
-- Written by `pgpark migrate` and by the script of `pgpark migrate --dump-sql`; safe to run again.

create schema if not exists pgpark;

create table if not exists pgpark.migration (
  name       text primary key,
  hash       text not null,
  applied_at timestamptz not null default clock_timestamp()
);

comment on schema pgpark is 'A parking lot for expensive work: exact capacity, priorities, leases and a mailbox.';
comment on table pgpark.migration is 'What was applied to this database: file name below sql/, SHA-256 of its text, time.';
