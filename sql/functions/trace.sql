-- Trace context (W3C): a submit may belong to a trace, and the task goes on in it. The context is in the message's metadata,
-- beside the payload, so it moves, and ends, with that. Workers that trace ask for it once they have claimed.

create or replace function pgpark.park_traces(task_ids bigint[])
returns table (task_id bigint, traceparent text, tracestate text)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  ids constant bigint[] := case when pgpark._is_stranger() then pgpark._own(array['worker'], task_ids) else task_ids end;
  lot pgpark.pool;
  asked record;
begin
  for asked in
    select t.pool_id, array_agg(t.task_id) as task_ids, array_agg(t.msg_id) as msg_ids
    from unnest(ids) as i (task_id)
    join task t on t.task_id = any (array[i.task_id])
    group by t.pool_id
  loop
    select p.* into lot from pool p where p.pool_id = asked.pool_id;
    return query
    select a.task_id, a.message #>> '{metadata,traceparent}', a.message #>> '{metadata,tracestate}'
    from rows from (unnest(asked.task_ids), pgpark._read_messages(lot, asked.msg_ids)) as a (task_id, message)
    where a.message #> '{metadata}' ? 'traceparent'
      and a.message #>> '{metadata,task_id}' = a.task_id::text;
  end loop;
end
$$;

comment on function pgpark.park_traces is
'The trace contexts (W3C) that these live tasks were submitted with: rows (task_id, traceparent, tracestate), none for a task
without one. For workers that trace; see pgpark.traceparent in the manual of park_submit. Errors: 42501.';

-- The trace context of this session or transaction as metadata, null for none. What is not of the form of W3C is none: a trace
-- must not stop the work. A tracestate that is longer than anybody has to pass on (512) is left out.
create or replace function pgpark._trace() returns jsonb
language sql stable
as $$
  select jsonb_strip_nulls(jsonb_build_object(
           'traceparent', c.parent,
           'tracestate', case when c.state ~ '^[ -~]+=[ -~]+$' and length(c.state) <= 512 then c.state end))
  from (select current_setting('pgpark.traceparent', true) as parent, current_setting('pgpark.tracestate', true) as state) c
  where c.parent ~ '^([0-9a-e][0-9a-f]|f[0-9a-e])-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]{0,200})?$'
    and (length(c.parent) = 55 or c.parent !~ '^00')
    and substr(c.parent, 4, 32) <> repeat('0', 32)
    and substr(c.parent, 37, 16) <> repeat('0', 16);
$$;

-- Messages with that in their metadata.
create or replace function pgpark._with_trace(messages jsonb[]) returns jsonb[]
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  trace constant jsonb := pgpark._trace();
begin
  if trace is null then
    return messages;
  end if;
  return array(
    select jsonb_set(m.message, '{metadata}', (m.message -> 'metadata') || trace)
    from unnest(messages) with ordinality as m (message, ord)
    order by m.ord);
end
$$;
