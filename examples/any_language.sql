-- pgpark from any language: these are all the statements that a program issues, whatever its driver.
--
--   psql -v ON_ERROR_STOP=1 -f examples/any_language.sql "$(pgpark db url)"
--
-- Each statement below is one round trip. Where it says :old_task or :'worker', psql puts in a value that an earlier
-- statement returned (\gset) or that was set (\set); your program binds a parameter there, for instance in Go:
--
--   db.QueryRow(ctx, `select task_id, accepted, status, reason
--                     from pgpark.park_submit(pool => $1, payload => $2, units => $3, tenant => $4)`, ...)
--
-- Three rules hold for all of them:
--   * Arguments are named, so that you send only those you need; the others keep their defaults.
--   * A refusal that you must expect (full, late, too large, too slow) is returned. An error is raised only for what is
--     wrong in the program: 22023 bad value, 42704 unknown pool, 25001 a transaction above READ COMMITTED.
--   * A statement outside a transaction commits by itself. Inside yours it commits, or not, with the rest of it.
--
-- The file makes a pool of its own and drops it in the end, so that it can be run again and again.

\set QUIET on
\pset footer off
\pset null -
\set pool example_any_language
\set tenant example_any_language
\set worker 'worker-1'

-- What an earlier run left that was broken off half-way.
select pgpark.park_drop_pool(name => p.name, force => true)
from pgpark.park_pools() p
where p.name = :'pool'
\g /dev/null
select pgpark.park_ack(message_ids => array(select message_id from pgpark.park_fetch(tenant => :'tenant')))
\g /dev/null

\echo '\n== an operator makes the pool, once: 8 units, a worker that is silent for a second has lost its task'

select pgpark.park_put_pool(
  name => :'pool',
  config => '{"max_units": 8, "lease_secs": 1}');


\echo '\n== a client submits: the task parks, and its id is known'

select task_id as task, accepted, status, reason
from pgpark.park_submit(
  pool => :'pool',
  payload => '{"prompt": "Why is the sky blue?"}',
  units => 6,                     -- 6 of the 8 while it runs
  priority => 'high',
  deadline => now() + interval '10 minutes',  -- by when it must have started
  tenant => :'tenant',            -- whose mailbox the outcome goes to
  user_id => 'ada',
  session_id => 'tab-1',
  idempotency_key => 'request-1') -- the same call again gets the same task
\gset first_

select :first_task as task_id, :'first_accepted' as accepted, :'first_status' as status;

\echo '\n== the same call again, after a network error: accepted, as a duplicate of the first'

select *
from pgpark.park_submit(
  pool => :'pool', payload => '{"prompt": "Why is the sky blue?"}', units => 6, idempotency_key => 'request-1');

\echo '\n== refused: no error, a row that says why'

select * from pgpark.park_submit(pool => :'pool', payload => '{}', units => 9);

\echo '\n== many at once: one row each, in their order'

select *
from pgpark.park_submit_many(
  pool => :'pool',
  tasks => jsonb_build_array(
    jsonb_build_object('payload', '{"prompt": "And at dusk?"}'::jsonb, 'units', 4, 'tenant', :'tenant'),
    jsonb_build_object('payload', '{"prompt": "Tomorrow?"}'::jsonb, 'tenant', :'tenant',
                       'run_at', now() + interval '1 day')));

\echo '\n== inside a transaction of yours: what you roll back was never submitted'

begin;
select task_id, status from pgpark.park_submit(pool => :'pool', payload => '{"prompt": "Never mind."}');
rollback;


\echo '\n== a worker claims: what fits now, in rank order; of 8 units the first takes 6, so the second stays parked'

select task_id as task, attempt, payload ->> 'prompt' as prompt, priority, units
from pgpark.park_claim(
  pool => :'pool',
  worker => :'worker',            -- a name that no other worker has
  max_tasks => 2,                 -- as many as this process wants at once
  max_units => 8)                 -- what this machine has in all
\gset old_

select :old_task as task_id, :old_attempt as attempt, :'old_prompt' as prompt, :old_units as units;

\echo '\n== why does the second not run?'

select * from pgpark.park_explain(pool => :'pool');

\echo '\n== while it runs, every third of lease_secs: a heartbeat names its tasks; rows are the ids to stop (here none)'

select task_to_stop
from pgpark.park_heartbeat(
  pool => :'pool', worker => :'worker', task_ids => array[:old_task]::bigint[]) as task_to_stop;


\echo '\n== now this worker falls silent for longer than the lease, and another one claims: the same task, attempt 2'

select pg_sleep(1.2)
\g /dev/null

select task_id as task, attempt, payload ->> 'prompt' as prompt
from pgpark.park_claim(pool => :'pool', worker => 'worker-2', max_tasks => 1)
\gset new_

select :new_task as task_id, :new_attempt as attempt, :'new_prompt' as prompt;

\echo '\n== the first worker wakes up. Its heartbeat says: stop this one, it is no longer yours'

select task_to_stop
from pgpark.park_heartbeat(
  pool => :'pool', worker => :'worker', task_ids => array[:old_task]::bigint[]) as task_to_stop;

\echo '\n== and if it finishes all the same, it is fenced off: false, nothing was changed'

select pgpark.park_finish(
  task_id => :old_task,
  attempt => :old_attempt,        -- the attempt that the claim returned; this is the fence
  result => '{"answer": "too late"}') as accepted;

\echo '\n== who waits for work listens on this channel, and looks now and then all the same: a notification is a hint'

listen "pgpark.pool.example_any_language";  -- it ends with the name of the pool

\echo '\n== the second worker finishes with the current attempt: outcome, units and wake-up in one transaction'

select pgpark.park_finish(
  task_id => :new_task,
  attempt => :new_attempt,
  status => 'completed',          -- or failed (retried if the pool allows it), or dropped
  result => '{"answer": "Short waves are scattered most."}') as accepted;

unlisten "pgpark.pool.example_any_language";

\echo '\n== the units are free, the next task fits; this one fails, with a reason for people'

-- A worker that shuts down does not fail its tasks but calls park_release(task_id, attempt): back in their old places.
-- One that is busy calls park_next: outcomes, and the next claim, in one round trip and one transaction.
select task_id as task, attempt
from pgpark.park_claim(pool => :'pool', worker => 'worker-2', max_tasks => 1)
\gset next_

select *
from pgpark.park_finish_many(outcomes => jsonb_build_array(jsonb_build_object(
  'task_id', :next_task, 'attempt', :next_attempt, 'status', 'failed', 'reason', 'the model was not loaded')));


\echo '\n== a client asks for one task: where it is ...'

select task_id, status, attempt, worker, position from pgpark.park_status(task_id => :new_task);

\echo '\n== ... and for its outcome (no row while it has none; listen "pgpark.mailbox" tells when there is one)'

select status, reason, payload from pgpark.park_result(task_id => :new_task);

\echo '\n== or it comes back later and opens the mailbox: of the tenant, or of one user or session'

select message_id, task_id, user_id, session_id, status, reason, payload
from pgpark.park_fetch(tenant => :'tenant', max_messages => 50);

select array_agg(message_id) as ids from pgpark.park_fetch(tenant => :'tenant')
\gset message_
\echo '\n== once it has what it needs it acknowledges, and the messages are gone'

select pgpark.park_ack(message_ids => :'message_ids') as taken_out;


\echo '\n== an operator: the numbers, then the pool goes; the task for tomorrow is dropped with it, and says so'

select pool, max_units, used_units, running, parked, delayed, completed, failed, retried
from pgpark.park_stats(pool => :'pool');

select pgpark.park_drop_pool(name => :'pool', force => true)
\g /dev/null

select status, reason from pgpark.park_fetch(tenant => :'tenant');

select pgpark.park_ack(
  message_ids => array(select message_id from pgpark.park_fetch(tenant => :'tenant'))) as taken_out;
