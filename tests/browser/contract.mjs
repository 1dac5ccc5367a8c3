// The main path of the SQL contract in PGlite: Postgres in WebAssembly, as a browser has it, here in Node.
//
//   node --test tests/browser/contract.mjs        (pgpark.sql comes from `pgpark migrate --dump-sql`)
//
// Each test names the functions that it is about. To cover a new function, add a test that calls it: the last test
// compares what was called with what the schema offers.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

const examples = new URL("../../examples/browser/", import.meta.url);
const script = process.env.PGPARK_SQL ?? fileURLToPath(new URL("pgpark.sql", examples));
const module = process.env.PGLITE ?? fileURLToPath(new URL("node_modules/@electric-sql/pglite/dist/index.js", examples));
const { PGlite } = await import(module);

let db;
const called = new Set();
const heard = [];

// Every call goes through here: named arguments, rows back.
async function call(name, args = {}) {
  called.add(name);
  const keys = Object.keys(args);
  const named = keys.map((key, i) => `${key} => $${i + 1}`).join(", ");
  return (await db.query(`select * from pgpark.${name}(${named})`, Object.values(args))).rows;
}

async function value(name, args) {
  const [row] = await call(name, args);
  return Object.values(row)[0];
}

async function pool(name, config = {}) {
  await call("park_put_pool", { name, config: { max_units: 4, ...config } });
  return name;
}

async function parked(pool, args = {}) {
  const [row] = await call("park_submit", { pool, payload: { n: 1 }, ...args });
  assert.equal(row.accepted, true, row.reason);
  return row.task_id;
}

const claim = (pool, args = {}) => call("park_claim", { pool, worker: "w", max_tasks: 10, ...args });
const code = (expected) => (error) => error.code === expected;

// Replaces the one clock, so that time passes without waiting.
const advance = (seconds) => db.exec(`update clock set ahead = ahead + interval '${seconds} seconds'`);

before(async () => {
  db = await PGlite.create();
  await db.transaction(async (transaction) => transaction.exec(await readFile(script, "utf8")));
  await db.exec(`
    create table clock (ahead interval not null);
    insert into clock values ('0');
    create or replace function pgpark._now() returns timestamptz language plpgsql volatile as
    $$ begin return clock_timestamp() + (select ahead from public.clock); end $$;`);
});

after(() => db.close());

test("park_put_pool, park_change_pool, park_pools, park_set_pool_state, park_drop_pool", async () => {
  assert.equal(await value("park_put_pool", { name: "made", config: { max_units: 4 } }), "created");
  assert.equal(await value("park_put_pool", { name: "made", config: { max_units: 4 } }), "unchanged");
  assert.equal(await value("park_put_pool", { name: "made", config: { max_units: 8 } }), "changed");
  await assert.rejects(call("park_put_pool", { name: "made", config: { max_unit: 8 } }), code("22023"));

  assert.equal(await value("park_change_pool", { name: "made", changes: { retry: { max_attempts: 2 } } }), "changed");
  assert.equal((await call("park_pools", { pool: "made" }))[0].settings.retry.max_attempts, 2);

  await call("park_set_pool_state", { name: "made", state: "paused" });
  const [row] = await call("park_pools", { pool: "made" });
  assert.equal(row.state, "paused");
  assert.equal(row.settings.max_units, 8);
  const id = await parked("made");
  assert.deepEqual(await claim("made"), []);

  await assert.rejects(call("park_drop_pool", { name: "made" }), code("55006"));
  await call("park_drop_pool", { name: "made", force: true });
  assert.deepEqual((await call("park_result", { task_id: id })).map((r) => [r.status, r.reason]), [["dropped", "pool_dropped"]]);
  await assert.rejects(call("park_pools", { pool: "made" }), code("42704"));
});

test("park_submit and park_submit_many: parked, delayed, and every refusal", async () => {
  await pool("submits", { max_queue_depth: 3 });
  const rows = await call("park_submit_many", {
    pool: "submits",
    tasks: [
      { payload: { prompt: "ümlaut" }, priority: "low", idempotency_key: "k" },
      { payload: null, units: 4, run_at: "2999-01-01T00:00:00Z" },
      { payload: 1, units: 5 },
      { payload: 2, deadline: "2001-01-01T00:00:00Z" },
      { payload: 3, idempotency_key: "k" },
      { payload: 4 },
      { payload: 5 },
    ],
  });
  assert.deepEqual(
    rows.map((row) => [row.accepted, row.status, row.reason]),
    [
      [true, "parked", null],
      [true, "delayed", null],
      [false, "rejected", "too_large"],
      [false, "rejected", "deadline_expired"],
      [true, "parked", "duplicate"],
      [true, "parked", null],
      [false, "rejected", "queue_full"],
    ],
  );
  const [again] = await call("park_submit", { pool: "submits", payload: {}, idempotency_key: "k" });
  assert.deepEqual([again.task_id, again.reason], [rows[0].task_id, "duplicate"]);
  await call("park_set_pool_state", { name: "submits", state: "draining" });
  assert.equal((await call("park_submit", { pool: "submits", payload: {} }))[0].reason, "pool_closed");
  await assert.rejects(call("park_submit", { pool: "submits", payload: {}, priority: "urgent" }), code("22023"));
  await assert.rejects(call("park_submit", { pool: "nowhere", payload: {} }), code("42704"));
});

test("a submit that is rolled back was none", async () => {
  await pool("undone");
  await db.query("begin");
  await parked("undone");
  await db.query("rollback");
  assert.equal((await call("park_stats", { pool: "undone" }))[0].parked, 0);
});

test("park_claim: rank order, exact capacity, the worker's own capacity, the head", async () => {
  await pool("claims");
  const low = await parked("claims", { priority: "low", units: 1 });
  const wide = await parked("claims", { units: 3, payload: { prompt: "ümlaut" } });
  const wider = await parked("claims", { units: 2 });
  const urgent = await parked("claims", { priority: "critical", units: 1 });
  const got = await claim("claims", { max_units: 4 });
  assert.deepEqual(got.map((task) => task.task_id), [urgent, wide]);
  assert.deepEqual(got[1].payload, { prompt: "ümlaut" });
  assert.deepEqual(await claim("claims", { worker: "other" }), []);

  assert.equal(await value("park_finish", { task_id: urgent, attempt: 1 }), true);
  assert.deepEqual(await claim("claims"), [], "one unit is free, but the head wants two");
  assert.deepEqual(
    (await call("park_explain", { pool: "claims" })).map((row) => [row.task_id, row.position, row.why]),
    [[wider, 0, "no units"], [low, 1, "held for head"]],
  );
  assert.equal(await value("park_finish", { task_id: wide, attempt: 1 }), true);
  assert.deepEqual((await claim("claims", { worker: "small", max_units: 2 })).map((task) => task.task_id), [wider]);
});

test("park_next: outcomes and the next claim in one call", async () => {
  await pool("next", { max_units: 1 });
  const [one, two] = [await parked("next"), await parked("next")];
  await claim("next");
  const outcomes = [{ task_id: one, attempt: 1, result: 41 }, { task_id: one, attempt: 9 }];
  const rows = await call("park_next", { pool: "next", worker: "w", outcomes });
  assert.deepEqual(rows.map((row) => [row.task_id, row.attempt, row.fenced]), [[two, 1, false], [one, 9, true]]);
  assert.equal((await call("park_result", { task_id: one }))[0].payload, 41);
});

test("park_finish and park_finish_many: one outcome; a late attempt is fenced; a failure is retried", async () => {
  await pool("finishes", { retry: { max_attempts: 2, backoff_secs: 10 }, archive: true });
  const [one, two, three] = [await parked("finishes"), await parked("finishes"), await parked("finishes")];
  await claim("finishes");
  assert.equal(await value("park_finish", { task_id: one, attempt: 2 }), false);
  assert.equal(await value("park_finish", { task_id: one, attempt: 1, result: { answer: 42 } }), true);
  assert.equal(await value("park_finish", { task_id: one, attempt: 1 }), false);
  assert.deepEqual((await call("park_result", { task_id: one }))[0].payload, { answer: 42 });

  const written = await call("park_finish_many", {
    outcomes: [
      { task_id: two, attempt: 1, status: "failed", reason: "no luck" },
      { task_id: three, attempt: 1 },
      { task_id: 987654, attempt: 1 },
    ],
  });
  assert.deepEqual(written.map((row) => row.accepted), [true, true, false]);
  assert.equal((await call("park_status", { task_id: two }))[0].status, "delayed");
  await advance(11);
  const [again] = await claim("finishes");
  assert.deepEqual([again.task_id, again.attempt], [two, 2]);
  await call("park_finish", { task_id: two, attempt: 2, status: "failed", reason: "no luck" });
  const [ended] = await call("park_status", { task_id: two });
  assert.deepEqual([ended.status, ended.reason, ended.attempt], ["failed", "no luck", 2]);
  assert.equal((await db.query("select count(*)::int as n from pgmq.a_finishes")).rows[0].n, 3);
});

test("park_release: back in its old place, and not counted", async () => {
  await pool("releases");
  const first = await parked("releases", { units: 4 });
  await parked("releases");
  await claim("releases");
  assert.equal(await value("park_release", { task_id: first, attempt: 1 }), true);
  assert.equal(await value("park_release", { task_id: first, attempt: 1 }), false);
  assert.equal((await call("park_status", { task_id: first }))[0].position, 0);
  assert.equal((await claim("releases"))[0].attempt, 2);
});

test("park_heartbeat and park_cancel: a renewed lease holds, a lapsed one does not; who must stop is told", async () => {
  await pool("leases", { lease_secs: 30 });
  const [kept, lost, unwanted] = [await parked("leases"), await parked("leases"), await parked("leases")];
  await claim("leases");
  await advance(20);
  assert.deepEqual(await call("park_heartbeat", { pool: "leases", worker: "w", task_ids: [kept, unwanted] }), []);
  await advance(20);
  assert.deepEqual((await claim("leases", { worker: "heir" })).map((t) => [t.task_id, t.attempt]), [[lost, 2]]);
  assert.equal(await value("park_finish", { task_id: lost, attempt: 1 }), false);

  assert.equal(await value("park_cancel", { task_id: unwanted, reason: "changed my mind" }), "cancelling");
  const stop = await call("park_heartbeat", { pool: "leases", worker: "w", task_ids: [kept, lost, unwanted] });
  assert.deepEqual(stop.map((row) => Object.values(row)[0]).sort((a, b) => a - b), [lost, unwanted]);
  await call("park_finish", { task_id: unwanted, attempt: 1, status: "failed" });
  assert.equal(await value("park_cancel", { task_id: unwanted }), "finished");
  assert.equal((await call("park_result", { task_id: unwanted }))[0].reason, "changed my mind");
  assert.equal(await value("park_cancel", { task_id: await parked("leases") }), "dropped");
  assert.equal(await value("park_cancel", { task_id: 987654 }), "unknown");
});

test("park_fetch, park_ack, park_result: the mailbox by tenant, user and session", async () => {
  await pool("mail");
  const id = await parked("mail", { tenant: "acme", user_id: "ada", session_id: "tab-1", idempotency_key: "once" });
  await parked("mail", { tenant: "acme", user_id: "bob" });
  await claim("mail");
  for (const task of [id, id + 1]) await call("park_finish", { task_id: task, attempt: 1, result: { task } });
  assert.equal((await call("park_fetch", { tenant: "acme" })).length, 2);
  assert.deepEqual(await call("park_fetch", { tenant: "acme", user_id: "ada", session_id: "tab-2" }), []);
  const mine = await call("park_fetch", { tenant: "acme", user_id: "ada", session_id: "tab-1", max_messages: 5 });
  assert.deepEqual(mine.map((row) => [row.task_id, row.status, row.payload]), [[id, "completed", { task: id }]]);
  assert.equal(await value("park_ack", { message_ids: [mine[0].message_id] }), 1);
  assert.deepEqual(await call("park_result", { task_id: id }), []);
  assert.equal((await call("park_submit", { pool: "mail", payload: {}, idempotency_key: "once" }))[0].reason, null);
});

test("park_status: from parked to its outcome", async () => {
  await pool("states");
  const id = await parked("states", { units: 2, priority: "high" });
  const seen = async () => (await call("park_status", { task_id: id }))[0];
  assert.deepEqual([(await seen()).status, (await seen()).position], ["parked", 0]);
  await claim("states");
  assert.deepEqual([(await seen()).status, (await seen()).worker], ["running", "w"]);
  await call("park_finish", { task_id: id, attempt: 1 });
  const ended = await seen();
  assert.deepEqual([ended.status, ended.priority, ended.units], ["completed", "high", 2]);
  assert.ok(ended.created_at <= ended.started_at && ended.started_at <= ended.finished_at);
});

test("park_prune and park_maintain: deadlines, delays, leases, retention, and when to look again", async () => {
  await pool("timers", { lease_secs: 30, mailbox: { ttl_secs: 100 } });
  const at = async (seconds) => (await db.query("select pgpark._now() + make_interval(secs => $1) as t", [seconds])).rows[0].t;
  await parked("timers", { deadline: await at(5) });
  assert.ok((await call("park_maintain", { pool: "timers" }))[0].next_due instanceof Date);
  await advance(6);
  assert.equal(await value("park_prune", { pool: "timers" }), 1);

  await parked("timers");
  await claim("timers");
  const delayed = await parked("timers", { run_at: await at(10) });
  await parked("timers", { run_at: await at(1000), deadline: await at(2000) });
  await advance(40);
  const [done] = await call("park_maintain", { pool: "timers" });
  assert.deepEqual([done.expired, done.reclaimed, done.promoted], [0, 1, 1]);
  assert.equal((await call("park_status", { task_id: delayed }))[0].status, "parked");
  await advance(100);
  assert.equal((await call("park_maintain"))[0].purged, 1);
});

test("park_stats: the numbers of a pool", async () => {
  await pool("numbers");
  await parked("numbers", { units: 3 });
  await parked("numbers", { units: 2 });
  await parked("numbers", { run_at: "2999-01-01T00:00:00Z" });
  const [task] = await claim("numbers");
  let [row] = await call("park_stats", { pool: "numbers" });
  assert.deepEqual([row.used_units, row.running, row.parked, row.delayed, row.workers], [3, 1, 1, 1, 1]);
  await call("park_finish", { task_id: task.task_id, attempt: 1 });
  [row] = await call("park_stats", { pool: "numbers" });
  assert.deepEqual([row.used_units, row.completed], [0, 1]);
});

test("park_lot: the picture of a pool", async () => {
  await pool("pictured");
  await parked("pictured", { units: 3, tenant: "a" });
  await parked("pictured", { units: 2, priority: "low" });
  const [running] = await claim("pictured");
  const lot = await value("park_lot", { pool: "pictured", max_tasks: 5 });
  assert.deepEqual([lot.used_units, lot.running.tasks[0].task_id, lot.line.why], [3, running.task_id, "no units"]);
  assert.deepEqual(lot.parked.lanes.map((lane) => [lane.priority, lane.count]), [["critical", 0], ["high", 0], ["normal", 0], ["low", 1]]);
  await assert.rejects(call("park_lot", { pool: "pictured", max_tasks: 0 }), code("22023"));
});

test("park_retry: out of a backoff, and once more after the end", async () => {
  await pool("retried", { archive: true, retry: { max_attempts: 2, backoff_secs: 1000 } });
  const id = await parked("retried", { payload: { again: true } });
  const fail = (attempt) => call("park_finish", { task_id: id, attempt, status: "failed", reason: "no luck" });
  await claim("retried");
  await fail(1);
  assert.deepEqual((await call("park_retry", { task_id: id }))[0], { task_id: id, accepted: true, status: "parked", reason: null });
  await claim("retried");
  await fail(2);
  const [again] = await call("park_retry", { task_id: id });
  const [task] = await claim("retried");
  assert.deepEqual([task.task_id, task.payload], [again.task_id, { again: true }]);
});

test("park_metrics, park_demand, park_history: what monitors draw", async () => {
  await pool("measured", { max_units: 4 });
  for (const units of [3, 2]) await parked("measured", { units });
  const [task] = await claim("measured");
  assert.equal(Number(await value("park_demand", { pool: "measured" })), 5);
  await advance(2);
  await call("park_finish", { task_id: task.task_id, attempt: 1 });
  const rows = await call("park_metrics", { pool: "measured" });
  const metric = (name) => Math.round(rows.find((row) => row.metric === name).value);
  assert.deepEqual(["pgpark_started_total", "pgpark_capacity_units", "pgpark_run_seconds_sum"].map(metric), [1, 4, 2]);
  const steps = await call("park_history", { pool: "measured", period: "10 minutes" });
  assert.equal(steps.length, 10);
  assert.equal(steps.reduce((sum, step) => sum + Number(step.completed), 0), 1);
});

test("park_llm_units: what a request costs", async () => {
  await pool("llm", {
    max_units: 24, cost_model: { model_vram_gb: 4, kv_per_token_mb: 0.5, max_batch_tokens: 8192 },
  });
  assert.equal(await value("park_llm_units", { pool: "llm", prompt_tokens: 1000, max_tokens: 1048 }), 5);
  await assert.rejects(call("park_llm_units", { pool: "llm", prompt_tokens: -1, max_tokens: 1 }), code("22023"));
});

test("fair share, a tenant's limit and drop_lowest", async () => {
  await pool("fair", { fairness: "tenant", tenants: { big: { max_units: 2 } }, max_queue_depth: 4, overflow: "drop_lowest" });
  const submit = (tenant, priority) => parked("fair", { tenant, priority });
  const [one, two, three] = [await submit("big", "normal"), await submit("big", "normal"), await submit("big", "low")];
  const other = await submit("small", "normal");
  const urgent = await submit("small", "high"); // the lot is full: the lowest makes room
  assert.equal((await call("park_status", { task_id: three }))[0].status, "dropped");
  assert.deepEqual((await claim("fair")).map((task) => task.task_id), [urgent, one, other, two]);
});

test("park_llm_capacity: what a card holds", async () => {
  const cost_model = {
    num_hidden_layers: 32, num_key_value_heads: 8, head_dim: 128, weights_gb: 15, gpu_vram_total_gb: 24, unit_mb: 64,
  };
  const [row] = await call("park_llm_capacity", { cost_model });
  assert.equal(Number(row.bytes_per_token), 131072);
  assert.equal(row.max_units, Math.floor(((24 * 0.9 - 15) * 1024) / 64));
});

test("park_plan_pool and moves between all kinds of queues and mailboxes", async () => {
  await pool("moving");
  const ids = [await parked("moving", { tenant: "m" })];
  const kinds = [
    { queue: { type: "in_memory" }, mailbox: { storage: { type: "in_memory" } } },
    { queue: { type: "postgres_custom", table: "own" }, mailbox: { storage: { type: "postgres", table: "outcomes" } } },
    { queue: { type: "yaque", path: "./data", stream: "stream" } },
    {},
  ];
  for (const kind of kinds) {
    const plan = await call("park_plan_pool", { name: "moving", config: { max_units: 4, ...kind } });
    assert.ok(plan.some((row) => row.key.startsWith("queue.")));
    assert.equal(await value("park_put_pool", { name: "moving", config: { max_units: 4, ...kind } }), "changed");
    ids.push(await parked("moving", { tenant: "m" }));
    const [task] = await claim("moving", { max_tasks: 1 });
    assert.equal(await value("park_finish", { task_id: task.task_id, attempt: 1 }), true);
  }
  const found = await call("park_fetch_of", { pool: "moving", tenant: "m" });
  assert.deepEqual(found.map((row) => row.task_id), ids.slice(0, -1), "whatever part of the mailbox they are in");
});

test("park_config_schema", async () => {
  const schema = await value("park_config_schema");
  assert.ok(schema.properties.pools.additionalProperties.properties.max_units);
});

test("park_emit, park_emit_many, park_parts", async () => {
  await pool("parts");
  const task_id = await parked("parts");
  await claim("parts");
  assert.equal(await value("park_emit", { task_id, attempt: 1, parts: [{ content: "to" }] }), true);
  assert.equal(await value("park_emit", { task_id, attempt: 2, parts: [{ content: "late" }] }), false);
  const [row] = await call("park_emit_many", { emissions: [{ task_id, attempt: 1, parts: [{ content: "ken" }] }] });
  assert.equal(row.accepted, true);
  assert.deepEqual((await call("park_parts", { task_id })).map((part) => part.content), ["to", "ken"]);
});

test("park_callbacks, park_callback_done, park_callbacks_due, park_dead_letters, park_retry_callbacks", async () => {
  await pool("told", { mailbox: { notifier: { base_url: "https://example.com/hooks", auth_header: "Bearer hidden" } } });
  const id = await parked("told", { tenant: "a/b", user_id: "ü" });
  await claim("told");
  await call("park_finish", { task_id: id, attempt: 1, result: { text: "hi" } });
  assert.deepEqual((await call("park_callbacks_due")).map((row) => row.pool), ["told"]);
  const [callback] = await call("park_callbacks", { pool: "told" });
  assert.equal(callback.url, "https://example.com/hooks/mailbox/a%2Fb/%C3%BC");
  assert.equal(callback.auth_header, "Bearer hidden");
  const done = (http_status) =>
    value("park_callback_done", { callback_id: callback.callback_id, attempt: 1, http_status });
  assert.equal(await done(410), "dead");
  assert.deepEqual((await call("park_dead_letters")).map((row) => row.http_status), [410]);
  assert.equal(await value("park_retry_callbacks"), 1);
  await call("park_callbacks", { pool: "told" });
  assert.equal(await done(204), "delivered");
  assert.ok(!JSON.stringify(await call("park_pools")).includes("hidden"));
});

test("a transaction above READ COMMITTED is refused", async () => {
  await db.query("begin transaction isolation level repeatable read");
  await assert.rejects(call("park_claim", { pool: "claims", worker: "w" }), code("25001"));
  await db.query("rollback");
});

test("LISTEN hears of work, of a cancel and of outcomes", async () => {
  await pool("bells");
  const channels = { pool: '"pgpark.pool.bells"', mailbox: '"pgpark.mailbox"' }; // quoted: there are dots in them
  for (const [short, channel] of Object.entries(channels)) {
    await db.listen(channel, (message) => heard.push([short, message]));
  }
  const during = async (work) => {
    heard.length = 0;
    const result = await work();
    await new Promise((resolve) => setImmediate(resolve));
    return result;
  };
  const id = await during(() => parked("bells"));
  assert.deepEqual(heard, [["pool", ""]]);
  await claim("bells");
  await during(() => call("park_cancel", { task_id: id }));
  assert.deepEqual(heard, [["pool", "cancel"]]);
  await during(() => call("park_finish", { task_id: id, attempt: 1, status: "failed" }));
  assert.deepEqual(heard.sort(), [["mailbox", String(id)], ["pool", ""]]);
  // What listen() returns forgets the quotes (PGlite 0.5.16).
  for (const channel of Object.values(channels)) await db.unlisten(channel);
});

test("park_grant, park_revoke, park_grants: a producer of one tenant", async () => {
  await pool("granted");
  await db.exec("create role web");
  await call("park_grant", { role: "web", kind: "producer", tenants: ["a"], pools: ["granted"] });
  assert.deepEqual(await call("park_grants"), [{ role: "web", kind: "producer", tenants: ["a"], pools: ["granted"] }]);
  const foreign = await parked("granted", { tenant: "b" });
  await db.exec("set role web");
  const own = await parked("granted", { tenant: "a" });
  assert.equal((await call("park_status", { task_id: own })).length, 1);
  assert.equal((await call("park_status", { task_id: foreign })).length, 0);
  await assert.rejects(call("park_submit", { pool: "granted", payload: 1, tenant: "b" }), code("42501"));
  await assert.rejects(call("park_stats"), code("42501"));
  await assert.rejects(db.query("select * from pgpark.task"), code("42501"));
  await db.exec("reset role");
  assert.equal(await value("park_revoke", { role: "web" }), 1);
  await db.exec("drop role web");
});

test("park_create_token, park_tokens, park_enter, park_admit, park_revoke_token: a token of one tenant", async () => {
  await pool("tokens");
  const secret = await value("park_create_token",
    { name: "t", kinds: ["producer"], tenants: ["a"], requests_per_sec: 1, burst: 1 });
  const [{ token_hash }] = (await db.query("select encode(sha256(convert_to($1::text, 'UTF8')), 'hex') as token_hash", [secret])).rows;
  const foreign = await parked("tokens", { tenant: "b" });
  await db.exec("begin");
  const [scope] = await call("park_enter", { token_hash });
  assert.deepEqual([scope.name, scope.kinds, scope.tenants], ["t", ["producer"], ["a"]]);
  const own = await parked("tokens", { tenant: "a" });
  assert.equal((await call("park_status", { task_id: own })).length, 1);
  assert.equal((await call("park_status", { task_id: foreign })).length, 0);
  await db.exec("commit");
  assert.equal((await call("park_status", { task_id: foreign })).length, 1);
  assert.equal((await call("park_admit", { token_hash }))[0].admitted, true);
  const [second] = await call("park_admit", { token_hash });
  assert.equal(second.admitted, false);
  assert.ok(second.retry_after_secs > 0);
  assert.equal((await call("park_tokens"))[0].requests_per_sec, 1);
  assert.equal(await value("park_revoke_token", { name: "t" }), true);
  assert.equal(await value("park_revoke_token", { name: "t" }), false);
  await assert.rejects(call("park_enter", { token_hash }), code("28000"));
});

test("park_follow: each outcome once, from a bookmark on", async () => {
  await pool("followed");
  const end = async () => {
    const id = await parked("followed", { tenant: "follower" });
    await claim("followed");
    await value("park_finish", { task_id: id, attempt: 1 });
    return id;
  };
  const first = await end();
  const [seen] = await call("park_follow", { tenant: "follower" });
  assert.equal(seen.task_id, first);
  const second = await end();
  const rows = await call("park_follow", { tenant: "follower", bookmark: seen.bookmark });
  assert.deepEqual(rows.map((row) => row.task_id), [second]);
  await assert.rejects(call("park_follow", { tenant: "follower", bookmark: "x" }), code("22023"));
});

test("max_payload_kb: a larger payload is refused, a larger result fails the task", async () => {
  await pool("small", { max_payload_kb: 1 });
  const [large] = await call("park_submit", { pool: "small", payload: { t: "x".repeat(1016) } });
  assert.deepEqual([large.accepted, large.reason], [false, "payload_too_large"]);
  const id = await parked("small", { payload: { t: "x".repeat(1015) } });
  await claim("small");
  assert.equal(await value("park_finish", { task_id: id, attempt: 1, result: { t: "x".repeat(2000) } }), true);
  const [outcome] = await call("park_result", { task_id: id });
  assert.deepEqual([outcome.status, outcome.payload], ["failed", null]);
  assert.match(outcome.reason, /^result too large: 2 KiB, the pool takes 1/);
});

test("park_traces: the trace context that a task was submitted with", async () => {
  await pool("traced");
  const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  await db.exec(`set pgpark.traceparent = '${traceparent}'`);
  const id = await parked("traced");
  await db.exec("reset pgpark.traceparent");
  const without = await parked("traced");
  const rows = await call("park_traces", { task_ids: [id, without] });
  assert.deepEqual(rows, [{ task_id: id, traceparent, tracestate: null }]);
});

test("park_audit: what happened to a task, from the partition of its day", async () => {
  await pool("told", { audit: true });
  const id = await parked("told", { tenant: "a" });
  await claim("told");
  await call("park_finish", { task_id: id, attempt: 1 });
  const told = await call("park_audit", { task_id: id });
  assert.deepEqual(told.map((row) => [row.event, row.attempt, row.worker]),
    [["completed", 1, "w"], ["started", 1, "w"], ["submitted", null, null]]);
  assert.equal((await call("park_audit", { pool: "told", max_events: 1 })).length, 1);
  const { rows } = await db.query("select from pgpark.audit_rest");
  assert.equal(rows.length, 0);
});

test("park_doctor: nothing is wrong but the clock of these tests", async () => {
  const found = await call("park_doctor");
  assert.deepEqual(found.map((row) => [row.problem, row.subject]), [["function changed", "pgpark._now()"]]);
  assert.match(found[0].mend, /clock_timestamp/);
  assert.equal(found[0].disruptive, false);
});

test("every public function was called here", async () => {
  const { rows } = await db.query(
    "select distinct proname from pg_proc where pronamespace = 'pgpark'::regnamespace and proname ~ '^park_' order by 1");
  assert.deepEqual(rows.map((row) => row.proname).filter((name) => !called.has(name)), []);
});
