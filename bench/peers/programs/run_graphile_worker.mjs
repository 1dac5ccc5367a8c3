// Submits to and works for graphile-worker: see peers/graphile_worker.py.
import pg from "pg";
import { Logger, makeWorkerUtils, run, runMigrations } from "graphile-worker";
import { chunks, handler, main, options, serve, waitForGo, warm } from "./talk.mjs";

const TASK = "bench";
const BULK = 1000;
const logger = new Logger(() => (level, message) => level === "error" && console.error(message));

async function install() {
  const pgPool = new pg.Pool({ max: 1 });
  await runMigrations({ pgPool, logger });
  await pgPool.end();
}

async function submit() {
  const { payload } = options();
  const pgPool = new pg.Pool({ max: 1 });
  const utils = await makeWorkerUtils({ pgPool, logger });
  await serve(
    async (count) => {
      for (let nth = 0; nth < count; nth++) await utils.addJob(TASK, payload);
    },
    async (count) => {
      for (const size of chunks(count, BULK)) {
        await utils.addJobs(Array.from({ length: size }, () => ({ identifier: TASK, payload })));
      }
    },
  );
  process.exit(0);
}

async function work() {
  const chosen = options();
  const handle = handler(chosen);
  const pgPool = new pg.Pool({ max: chosen.connections });
  await warm(pgPool, chosen.connections);
  await waitForGo();
  await run({
    pgPool,
    logger,
    noHandleSignals: true,
    taskList: { [TASK]: async () => handle() },
    preset: {
      worker: {
        concurrentJobs: chosen.concurrency,
        localQueue: { size: chosen.local_queue },
        completeJobBatchDelay: chosen.batch_delay,
        failJobBatchDelay: chosen.batch_delay,
      },
    },
  });
}

await main({ install, submit, work });
