// Submits to and works for pg-boss: see peers/pg_boss.py.
import { PgBoss } from "pg-boss";
import { chunks, handler, main, options, serve, sleep, waitForGo } from "./talk.mjs";

const QUEUE = "bench";
const BULK = 1000;

// The connection comes from the PG* variables; a submitter does none of the maintenance.
async function start(settings) {
  const boss = new PgBoss({ database: process.env.PGDATABASE, ...settings });
  boss.on("error", (error) => console.error(error.message));
  await boss.start();
  return boss;
}

async function install() {
  const boss = await start({ supervise: false, schedule: false });
  await boss.createQueue(QUEUE, { notify: true });
  await boss.stop({ graceful: false });
}

async function submit() {
  const { payload } = options();
  const boss = await start({ max: 1, supervise: false, schedule: false });
  await serve(
    async (count) => {
      for (let nth = 0; nth < count; nth++) await boss.send(QUEUE, payload);
    },
    async (count) => {
      for (const size of chunks(count, BULK)) {
        await boss.insert(QUEUE, Array.from({ length: size }, () => ({ data: payload })));
      }
    },
  );
  process.exit(0);
}

async function work() {
  const chosen = options();
  const handle = handler(chosen);
  const boss = await start({ max: chosen.connections, useListenNotify: chosen.batch > 1 });
  await waitForGo();
  if (chosen.batch > 1) {
    const settings = { batchSize: chosen.batch, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 };
    await boss.work(QUEUE, settings, async (jobs) => jobs.forEach(handle));
    return;
  }
  for (;;) {
    const jobs = await boss.fetch(QUEUE);
    if (jobs.length === 0) await sleep(10);
    for (const job of jobs) {
      handle();
      await boss.complete(QUEUE, job.id, { ok: true });
    }
  }
}

await main({ install, submit, work });
