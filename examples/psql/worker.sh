#!/usr/bin/env bash
# A worker of one task at a time: claims it, keeps its lease while it works, finishes it. Start several.
#
#   worker.sh NAME        until SIGTERM, which puts back what is not done; a name that no other worker has
set -euo pipefail

name=${1:?usage: worker.sh NAME}
id='' attempt='' job=''

sql() { # statements on standard input; what they print, fields parted by tabs
  psql -XqAt -F $'\t' -v ON_ERROR_STOP=1 -v worker="$name" -v id="$id" -v attempt="$attempt" "${PGPARK_DSN:?is not set}"
}

stop() {
  trap - TERM
  [ -z "$job" ] || kill "$job" 2>/dev/null || true
  [ -z "$id" ] || sql <<<"select pgpark.park_release(task_id => :id, attempt => :attempt)" >/dev/null # back in its place
  exit 0
}
trap stop TERM

work() { # the work: a payload in, a result out
  sleep "$(jq_free seconds "$1")" && printf '{"answer": "%s: done", "by": "%s"}' "$(jq_free prompt "$1")" "$name"
}
jq_free() { sed -E "s/.*\"$1\": \"?([^\",}]*)\"?.*/\1/" <<<"$2"; } # good enough for this payload

while true; do
  id='' attempt='' payload=''
  # park_maintain runs the timers that are due: deadlines, lost workers, retries.
  IFS=$'\t' read -r id attempt units payload < <(sql <<'SQL'
select from pgpark.park_maintain(pool => 'example_psql')
\g /dev/null
select task_id, attempt, units, payload from pgpark.park_claim(pool => 'example_psql', worker => :'worker', max_tasks => 1);
SQL
  ) || true
  if [ -z "$id" ]; then
    sleep 0.2 # psql cannot wait for a notification; a program would: listen "pgpark.pool.example_psql"
    continue
  fi
  echo "$name: task $id, attempt $attempt, $units units"
  result=$(mktemp)
  work "$payload" >"$result" &
  job=$!
  status=completed
  while kill -0 "$job" 2>/dev/null; do
    if [ -n "$(sql <<<"select pgpark.park_heartbeat(pool => 'example_psql', worker => :'worker', task_ids => array[:id])")" ]; then
      kill "$job" 2>/dev/null || true # cancelled, out of time, or no longer ours
      status=failed
    fi
    sleep 0.2 # every third of the lease would do
  done
  wait "$job" || status=failed
  job=''
  accepted=$(sql <<SQL
\set status $status
\set result $(printf "'%s'" "$(sed "s/'/''/g; s/\\\\/\\\\\\\\/g" "$result")")
select pgpark.park_finish(task_id => :id, attempt => :attempt, status => :'status', result => nullif(:'result', '')::jsonb);
SQL
  )
  rm "$result"
  [ "$accepted" = t ] || echo "$name: task $id was no longer ours"
done
