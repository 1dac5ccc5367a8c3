-- Where the payloads of a pool are kept.

create or replace function pgpark._create_queue(pool_name text, queue_type text, queue_name text) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  if exists (select from pgmq.list_queues() q where q.queue_name = _create_queue.queue_name)
     or to_regclass(format('pgmq.%I', 'q_' || _create_queue.queue_name)) is not null then
    raise exception 'pools.%.queue.queue_name: there is a pgmq queue % already', pool_name,
                    quote_literal(_create_queue.queue_name)
      using errcode = '42710',
            hint = 'Its messages are no tasks. Name another one: {"queue": {"type": "postgres_pgmq", "queue_name": "..."}}';
  end if;
  if queue_type = 'in_memory' then
    perform pgmq.create_unlogged(_create_queue.queue_name);
    -- From 15 on the sequence of an unlogged table is unlogged too: after a crash it would start again, and new
    -- messages would get the numbers that old tasks refer to.
    if current_setting('server_version_num')::int >= 150000 then
      execute format('alter sequence pgmq.%I set logged', 'q_' || _create_queue.queue_name || '_msg_id_seq');
    end if;
  else
    perform pgmq.create(_create_queue.queue_name);
  end if;
end
$$;
