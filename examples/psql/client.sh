#!/usr/bin/env bash
# A client: submits tasks and goes away; comes back for the results, which wait in the mailbox of its tenant.
#
#   client.sh submit      makes the pool, submits nine tasks, prints their ids
#   client.sh fetch 9     waits for nine results, prints them, and takes them out of the mailbox
set -euo pipefail

sql() { psql -XqAt -v ON_ERROR_STOP=1 "$@" "${PGPARK_DSN:?is not set}"; } # statements on standard input

case "${1:-} ${2:-}" in
"submit ")
  sql <<'SQL'
select pgpark.park_put_pool(name => 'example_psql', config => '{"max_units": 24, "lease_secs": 2}')
\g /dev/null
select coalesce(task_id::text, 'refused: ' || reason)
from pgpark.park_submit_many(
  pool => 'example_psql',
  tasks => (
    select jsonb_agg(jsonb_build_object(
      'payload', jsonb_build_object('prompt', 'prompt ' || n, 'seconds', 0.5),
      'units', units,
      'tenant', 'example_psql',
      'priority', case when n % 3 = 0 then 'high' else 'normal' end))
    from unnest(array[8, 16, 4, 12, 2, 6, 10, 3, 5]) with ordinality as t (units, n)));
SQL
  ;;
"fetch "[1-9]*)
  until [ "$(sql <<<"select count(*) >= $2 from pgpark.park_fetch(tenant => 'example_psql', max_messages => $2)")" = t ]; do
    sleep 0.2 # psql cannot wait for a notification; a program would: listen "pgpark.mailbox"
  done
  sql -v count="$2" <<'SQL'
begin;
select task_id, status, payload from pgpark.park_fetch(tenant => 'example_psql', max_messages => :count);
select pgpark.park_ack(message_ids => array(
  select message_id from pgpark.park_fetch(tenant => 'example_psql', max_messages => :count)))
\g /dev/null
commit;
SQL
  ;;
*)
  echo "usage: client.sh submit | fetch COUNT" >&2
  exit 2
  ;;
esac
