// What the programs for Node share: the lines of peers/processes.py.
import fs from "node:fs";
import readline from "node:readline";

export const say = (line) => fs.writeSync(1, `${line}\n`);
export const options = () => JSON.parse(process.argv[3] ?? "{}");
const input = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

// A function to call at the start of each task: says `c N` at every step-th call, or `s NANOSECONDS` at each.
export function handler({ handler, step }) {
  if (handler === "stamp") return () => say(`s ${process.hrtime.bigint()}`);
  let calls = 0;
  return () => {
    calls += 1;
    if (calls % step === 0) say(`c ${calls}`);
  };
}

export async function waitForGo() {
  say("ready");
  const { value } = await input.next();
  if (value?.trim() !== "go") process.exit(1);
}

// Submits what it is told to, until its standard input ends.
export async function serve(one, bulk) {
  say("ready");
  for await (const line of input) {
    const [how, count] = line.split(" ");
    const began = process.hrtime.bigint();
    await (how === "one" ? one : bulk)(Number(count));
    say(`done ${began} ${process.hrtime.bigint()}`);
  }
}

// How large each of the batches is that count makes.
export const chunks = (count, size) =>
  Array.from({ length: Math.ceil(count / size) }, (_, nth) => Math.min(size, count - nth * size));

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Opens all connections of a pool, so that no task waits for one.
export async function warm(pool, count) {
  const clients = await Promise.all(Array.from({ length: count }, () => pool.connect()));
  for (const client of clients) client.release();
}

// Runs the function that the first argument names; any error ends the process with its message.
export async function main(commands) {
  try {
    await commands[process.argv[2]]();
  } catch (error) {
    console.error(error.message);
    process.exit(1);
  }
}
