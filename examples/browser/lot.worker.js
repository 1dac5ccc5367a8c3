// The Web Worker that holds Postgres and, beside it, the conductor: both off the page's thread, and not slowed down
// with it when the tab is in the background. The page sends statements and gets rows.

import { Conductor } from "./conductor.js";
import { eraseStore, openStore } from "./store.js";

const POOL = "browser";
const CONFIG = {
  max_units: 4, // four Web Workers
  resource_kind: "cpu",
  lease_secs: 10, // the tasks of a page that went away come back after it
  retry: { max_losses: 10 }, // reloading is what this page is for
  mailbox: { ttl_secs: 3600 },
};

let db;
let conductor;

onmessage = ({ data }) => {
  if (data.kind === "start") start(data).catch((error) => postMessage({ kind: "broken", message: one(error) }));
  else if (data.kind === "call") answer(data);
  else if (data.kind === "erase") eraseStore().then(() => postMessage({ kind: "erased" }));
};

async function start({ ports, store }) {
  const say = (text) => postMessage({ kind: "phase", text });
  db = await openStore(store, say);
  await query("select pgpark.park_put_pool($1, $2)", [POOL, CONFIG]);
  conductor = new Conductor({
    query, ports,
    pool: POOL,
    name: `page-${crypto.randomUUID().slice(0, 8)}`, // another one after each reload: its tasks are not ours
    leaseSecs: CONFIG.lease_secs,
    changed: () => tellChanged(),
    failed: (error) => postMessage({ kind: "trouble", message: one(error) }),
  });
  // The name has a dot in it, so it is quoted.
  await db.listen(`"pgpark.pool.${POOL}"`, (message) => {
    conductor.notified(message);
    tellChanged();
  });
  await db.listen('"pgpark.mailbox"', () => tellChanged());
  postMessage({ kind: "ready", worker: conductor.name, leaseSecs: CONFIG.lease_secs });
  conductor.run();
}

async function query(sql, params) {
  return (await db.query(sql, params)).rows;
}

async function answer({ id, sql, params }) {
  try {
    postMessage({ kind: "answer", id, rows: await query(sql, params) });
  } catch (error) {
    postMessage({ kind: "answer", id, error: one(error) });
  }
}

// Many changes at once are told once.
let telling = false;
function tellChanged() {
  if (telling) return;
  telling = true;
  setTimeout(() => {
    telling = false;
    postMessage({ kind: "changed", assignments: conductor.assignments() });
  }, 60);
}

function one(error) {
  return [error.message ?? String(error), error.hint].filter(Boolean).join(". ");
}
