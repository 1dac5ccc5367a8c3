// A client: submits tasks and goes away; comes back for the results, which wait in the mailbox of its tenant.
//
//   node client.mjs submit      makes the pool, submits nine tasks, prints their ids
//   node client.mjs fetch 9     waits for nine results, prints them, and takes them out of the mailbox

import { connect } from "./connect.mjs";

const POOL = "example_node";
const TENANT = "example_node";
const BACKSTOP_MS = 10_000; // a notification is a hint that can get lost

const db = await connect();
const [what, count = "9"] = process.argv.slice(2);
if (what === "submit") await submit();
else if (what === "fetch") await fetch(Number(count));
else {
  console.error("usage: node client.mjs submit | fetch COUNT");
  process.exitCode = 2;
}
await db.end();

async function submit() {
  await db.query("select pgpark.park_put_pool(name => $1, config => $2)", [POOL, { max_units: 24, lease_secs: 2 }]);
  const tasks = [8, 16, 4, 12, 2, 6, 10, 3, 5].map((units, n) => ({
    payload: { prompt: `prompt ${n}`, seconds: 0.5 },
    units,
    tenant: TENANT,
    priority: n % 3 ? "normal" : "high",
  }));
  // In a transaction of yours, call it between begin and commit. A refusal (full, late, too large) is a row, no error.
  const { rows } = await db.query("select * from pgpark.park_submit_many(pool => $1, tasks => $2)", [
    POOL,
    JSON.stringify(tasks), // an array must be JSON by itself: pg would make a Postgres array of it
  ]);
  for (const task of rows) console.log(task.accepted ? task.task_id : `refused: ${task.reason}`);
}

async function fetch(count) {
  let wake = () => {};
  db.on("notification", () => wake());
  await db.query('listen "pgpark.mailbox"');
  for (;;) {
    const heard = new Promise((resolve) => (wake = resolve)); // before looking, so that nothing is missed
    const { rows } = await db.query("select * from pgpark.park_fetch(tenant => $1, max_messages => $2)", [TENANT, count]);
    if (rows.length >= count) {
      for (const message of rows) console.log(message.task_id, message.status, JSON.stringify(message.payload));
      await db.query("select pgpark.park_ack(message_ids => $1)", [rows.map((message) => message.message_id)]);
      return;
    }
    let timer;
    await Promise.race([heard, new Promise((resolve) => (timer = setTimeout(resolve, BACKSTOP_MS)))]);
    clearTimeout(timer);
  }
}
