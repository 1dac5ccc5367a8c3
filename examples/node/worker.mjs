// A worker: claims what fits, runs it, keeps its lease, finishes it; sleeps until a notification or a timer is due.
//
//   node worker.mjs NAME        until SIGTERM, which puts back what is not done; a name that no other worker has
//
// bigint comes from pg as a string; keep it so, and give it back as it is.

import { setTimeout as sleep } from "node:timers/promises";
import { connect } from "./connect.mjs";

const POOL = "example_node";
const SLOTS = 8; // tasks at once in this process; what fits is the pool's business
const LEASE_SECS = 2; // as in the pool's config
const BACKSTOP_SECS = 30; // a notification is a hint that can get lost

const name = process.argv[2] ?? `node-${process.pid}`;
const running = new Map(); // task id: {attempt, stop}
let stopping = false;
let wake = () => {};

const db = await connect();
let last = Promise.resolve(); // of the queries: a connection does one at a time
const query = (...given) => (last = last.catch(() => {}).then(() => db.query(...given)));
db.on("error", (error) => {
  console.error(`${name}: lost the database: ${error.message}`); // its tasks go to others when their leases lapse
  process.exit(1);
});
db.on("notification", () => wake());
await query(`listen "pgpark.pool.${POOL}"`);
process.on("SIGTERM", () => {
  stopping = true;
  wake();
});
let beat = Promise.resolve(); // the last heartbeat
const beating = setInterval(() => (beat = heartbeat()), (LEASE_SECS * 1000) / 3);

while (!stopping) {
  const heard = new Promise((resolve) => (wake = resolve)); // before looking, so that nothing is missed
  const free = SLOTS - running.size;
  const claimed = free > 0 ? await claim(free) : [];
  for (const task of claimed) work(task);
  if (free > 0 && claimed.length === free) continue; // there may be more
  const timer = new AbortController();
  await Promise.race([heard, sleep((await secondsToNextTimer()) * 1000, null, { signal: timer.signal }).catch(() => {})]);
  timer.abort();
}

clearInterval(beating);
await beat; // end() would cut it off
for (const [task_id, { attempt, stop }] of running) {
  stop.abort("released");
  await query("select pgpark.park_release(task_id => $1, attempt => $2)", [task_id, attempt]); // back in its old place
}
await db.end();

async function claim(free) {
  const { rows } = await query(
    "select task_id, attempt, payload, units from pgpark.park_claim(pool => $1, worker => $2, max_tasks => $3)",
    [POOL, name, free],
  );
  return rows;
}

async function work({ task_id, attempt, payload, units }) {
  const stop = new AbortController();
  running.set(task_id, { attempt, stop });
  console.log(`${name}: task ${task_id}, attempt ${attempt}, ${units} units`);
  let outcome = ["completed", null, null];
  try {
    await sleep(payload.seconds * 1000, null, { signal: stop.signal }); // the work; it stops when it is told to
    outcome = ["completed", JSON.stringify({ answer: `${payload.prompt}: done`, by: name }), null];
  } catch (error) {
    outcome = ["failed", null, error.message];
  }
  if (stop.signal.reason === "released") return;
  const { rows } = await query(
    "select pgpark.park_finish(task_id => $1, attempt => $2, status => $3, result => $4, reason => $5) as accepted",
    [task_id, attempt, ...outcome],
  );
  running.delete(task_id);
  if (!rows[0].accepted) console.log(`${name}: task ${task_id} was no longer ours`);
  wake();
}

async function heartbeat() {
  const { rows } = await query("select pgpark.park_heartbeat(pool => $1, worker => $2, task_ids => $3) as task_id", [
    POOL,
    name,
    [...running.keys()],
  ]);
  for (const { task_id } of rows) running.get(task_id)?.stop.abort(); // cancelled, out of time, or lost
}

async function secondsToNextTimer() {
  const { rows } = await query(
    "select extract(epoch from next_due - clock_timestamp())::float8 as due from pgpark.park_maintain(pool => $1)",
    [POOL],
  );
  return Math.min(Math.max(rows[0].due ?? BACKSTOP_SECS, 0.02), BACKSTOP_SECS);
}
