// A connection to PGPARK_DSN. pg reads URLs; what `pgpark db url` prints, and libpq reads, may also be key=value pairs.

import pg from "pg";

const NAMES = { host: "host", port: "port", dbname: "database", user: "user", password: "password" };

export async function connect(dsn = process.env.PGPARK_DSN ?? "") {
  const db = new pg.Client(/^postgres(ql)?:/.test(dsn) ? { connectionString: dsn } : pairs(dsn));
  await db.connect();
  return db;
}

function pairs(dsn) {
  const settings = {};
  for (const [, name, quoted, plain] of dsn.matchAll(/(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|(\S+))/g)) {
    if (NAMES[name]) settings[NAMES[name]] = plain ?? quoted.replace(/\\(.)/g, "$1");
  }
  return settings;
}
