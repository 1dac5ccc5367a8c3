// Everything that the page draws, in one statement. Reads the ledger (pgpark.task) beside the functions, because only
// a picture needs all running tasks at once; a client that follows its own uses park_status and park_result.

export const SNAPSHOT = `
select
  (select to_jsonb(s) from pgpark.park_stats('browser') s) as stats,
  (select coalesce(jsonb_agg(to_jsonb(r) order by r.task_id), '[]')
   from (
     select t.task_id, t.state, t.units, t.attempt, t.worker, pgpark._priority_word(t.priority) as priority,
            extract(epoch from t.lease_until) * 1000 as lease_until
     from pgpark.task t
     where t.state in ('running', 'cancelling')
   ) r) as running,
  (select coalesce(jsonb_agg(to_jsonb(w) order by w.ord), '[]')
   from (
     select t.task_id, t.units, t.attempt, pgpark._priority_word(t.priority) as priority, e.why, e.ord,
            extract(epoch from t.deadline) * 1000 as deadline, extract(epoch from t.run_at) * 1000 as run_at
     from pgpark.park_explain('browser', 60) with ordinality as e (task_id, position, why, ord)
     join pgpark.task t using (task_id)
   ) w) as waiting,
  (select coalesce(jsonb_agg(to_jsonb(o) order by o.message_id desc), '[]')
   from (
     select m.message_id, m.task_id, m.status, m.reason, s.units, s.priority, s.attempt,
            extract(epoch from s.finished_at - s.started_at) as secs
     from (select * from pgpark.park_fetch($1, max_messages => 2000) order by message_id desc limit 12) m
     cross join lateral pgpark.park_status(m.task_id) s
   ) o) as outcomes`;
