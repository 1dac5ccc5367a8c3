// Postgres in this browser: opens PGlite on storage that outlives the page, and loads pgpark into it the first time.

import { OpfsAhpFS } from "./node_modules/@electric-sql/pglite/dist/fs/opfs-ahp.js";
import { PGlite } from "./node_modules/@electric-sql/pglite/dist/index.js";

const NAME = "pgpark-lot";
// Files that one transaction may make: they are opened beforehand, and the script of pgpark makes more than the usual 100.
const SPARE_FILES = 400;
const SCRIPT = new URL("./pgpark.sql", import.meta.url);

// Every statement is on disk before it is answered (PGlite's default), so that what was accepted outlives a reload.
// With files of the origin's private file system that costs milliseconds; IndexedDB is written as a whole snapshot,
// which takes a few hundred, so it is for browsers without such files, or for ?store=idb.
export async function openStore(kind, say) {
  const inSnapshots = (kind ?? (await bestKind())) === "idb";
  say("starting Postgres (the first time it makes its files, which takes a while)");
  const db = await retryWhileLocked(() => PGlite.create(inSnapshots
    ? { dataDir: `idb://${NAME}` }
    : { fs: new OpfsAhpFS(NAME, { maintainedPoolSize: SPARE_FILES }) }));
  await migrate(db, say);
  return db;
}

/** Forgets everything. The database must not be open. */
export async function eraseStore() {
  const folder = await navigator.storage.getDirectory?.();
  await folder?.removeEntry(NAME, { recursive: true }).catch(() => {});
  await new Promise((resolve) => {
    const request = indexedDB.deleteDatabase(`/pglite/${NAME}`);
    request.onsuccess = request.onerror = request.onblocked = resolve;
  });
}

async function bestKind() {
  const works = "createSyncAccessHandle" in (self.FileSystemFileHandle?.prototype ?? {});
  // Safari allows 252 open files of this kind, which is fewer than Postgres has.
  const safari = /^((?!chrome|android|firefox).)*safari/i.test(navigator.userAgent);
  const allowed = works && !safari && (await navigator.storage.getDirectory().then(() => true, () => false));
  return allowed ? "opfs" : "idb";
}

// After a reload the page before may still hold the files for a moment.
async function retryWhileLocked(open) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await open();
    } catch (error) {
      if (attempt === 20 || error?.name !== "NoModificationAllowedError") throw error;
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
  }
}

async function migrate(db, say) {
  const response = await fetch(SCRIPT);
  if (!response.ok) {
    throw new Error("pgpark.sql is not here; make it with: pgpark migrate --dump-sql > pgpark.sql");
  }
  const script = await response.text();
  const { rows } = await db.query("select to_regclass('pgpark.migration') is not null as installed");
  if (!rows[0].installed) {
    say("loading pgpark");
    await db.transaction((transaction) => transaction.exec(script));
    return;
  }
  // The script is for an empty database. It records the hash of each of its files: are ours the same?
  const wanted = [...script.matchAll(/^insert into pgpark\.migration .*'([0-9a-f]{64})'\);$/gm)].map(([, hash]) => hash);
  const applied = await db.query("select hash from pgpark.migration");
  const have = new Set(applied.rows.map((row) => row.hash));
  if (wanted.length !== have.size || !wanted.every((hash) => have.has(hash))) {
    await db.close();
    throw new Error("this browser keeps a lot of another version of pgpark; start afresh to go on");
  }
}
