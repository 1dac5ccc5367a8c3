// The page: buttons on one side, drawing on the other. Reads the lot again whenever it says that something changed.

import { Picture, drawLanes, drawMailbox, drawUnits } from "./draw.js";
import { Lot, UNITS } from "./lot.js";
import { SNAPSHOT } from "./snapshot.js";
import { TENANT, picture, tenMixed } from "./tasks.js";

const $ = (id) => document.getElementById(id);
const pictures = new Map(); // by task id
let assignments = Array(UNITS).fill(null);
let worker = null;
let paused = false;
let last = null; // what was drawn
let counting = false; // whether there is a countdown in it

const lot = new Lot();
window.lot = lot; // for the console: await lot.sql("select * from pgpark.park_stats()")

const on = (kind, listener) => lot.addEventListener(kind, ({ detail }) => listener(detail));
on("phase", ({ text }) => say(text));
on("trouble", ({ message }) => say(message, "trouble"));
on("broken", ({ message }) => {
  say(message, "trouble");
  $("afresh").hidden = false;
});
on("row", ({ task_id, attempt, row, scene }) => {
  let made = pictures.get(task_id);
  if (made?.attempt !== attempt) pictures.set(task_id, (made = new Picture(scene.width, scene.height, attempt)));
  made.paintRow(row.y, row.shades);
});
on("changed", (change) => {
  assignments = change.assignments;
  refresh();
});
on("ready", (ready) => {
  worker = ready.worker;
  say("");
  for (const button of document.querySelectorAll("#controls button")) button.disabled = false;
  document.body.dataset.ready = worker;
  refresh();
  setInterval(() => counting && draw(last), 250);
});

$("ten").addEventListener("click", () => attempt(() => lot.submit(tenMixed())));
$("critical").addEventListener("click", () => attempt(() => lot.submit([picture({ priority: "critical", units: 2 })])));
$("pause").addEventListener("click", () =>
  attempt(() => lot.sql("select pgpark.park_set_pool_state('browser', $1)", [paused ? "active" : "paused"])),
);
$("reload").addEventListener("click", () => location.reload());
$("empty").addEventListener("click", () =>
  attempt(async () => {
    await lot.sql(
      "select pgpark.park_ack(array(select message_id from pgpark.park_fetch($1, max_messages => 2000)))", [TENANT]);
    refresh();
  }),
);
$("afresh").addEventListener("click", async () => {
  await lot.erase();
  location.reload();
});

// The files of the database are for one page at a time.
navigator.locks.request("pgpark-lot", { ifAvailable: true }, async (lock) => {
  if (lock) return open();
  say("the lot is open in another tab; this one takes over when that one is closed");
  navigator.locks.request("pgpark-lot", open);
  return undefined;
});

function open() {
  lot.start(new URLSearchParams(location.search).get("store"));
  return new Promise(() => {}); // hold the lock as long as the page lives
}

// -- reading and drawing -------------------------------------------------------------------------------------------

let reading = false;
let stale = false;

async function refresh() {
  stale = true;
  if (reading) return;
  reading = true;
  try {
    while (stale) {
      stale = false;
      const [snapshot] = await lot.sql(SNAPSHOT, [TENANT]);
      await fetchPictures(snapshot.outcomes);
      draw(snapshot);
    }
  } catch (error) {
    say(error.message, "trouble");
  } finally {
    reading = false;
  }
}

// A picture that this page did not see being painted comes from the mailbox.
async function fetchPictures(outcomes) {
  for (const { task_id, status, attempt } of outcomes) {
    if (status !== "completed" || pictures.get(task_id)?.complete) continue;
    const seen = pictures.get(task_id);
    if (seen?.attempt === attempt) seen.complete = true;
    else {
      const [row] = await lot.sql("select payload from pgpark.park_result($1)", [task_id]);
      if (row?.payload?.shades) pictures.set(task_id, Picture.of(row.payload));
    }
  }
}

function draw(snapshot) {
  const { stats, running, waiting, outcomes } = snapshot;
  last = snapshot;
  paused = stats.state !== "active";
  const cancel = (id) => attempt(() => lot.sql("select pgpark.park_cancel($1)", [id]));
  keepingFocus(() => {
    drawUnits($("units"), { running, assignments, worker, pictures, cancel });
    drawLanes($("lanes"), { waiting, cancel });
    drawMailbox($("outcomes"), { outcomes, pictures });
  });
  $("used").textContent = `${stats.used_units} of ${stats.max_units} in use${paused ? ", paused" : ""}`;
  $("parked").textContent = `${stats.parked} parked${stats.delayed ? `, ${stats.delayed} delayed` : ""}`;
  $("counts").textContent = ["completed", "failed", "expired", "dropped"]
    .filter((status) => stats[status] > 0 || status === "completed")
    .map((status) => `${stats[status]} ${status}`)
    .join(", ");
  $("pause").textContent = paused ? "Resume" : "Pause";
  $("pause").setAttribute("aria-pressed", paused);
  counting = running.some((task) => task.worker !== worker) || waiting.some((task) => task.deadline || task.run_at);
  const shown = new Set([...running, ...outcomes].map((task) => task.task_id));
  for (const id of pictures.keys()) if (!shown.has(id) && pictures.get(id).complete) pictures.delete(id);
}

// Drawing replaces the buttons; whoever was on one by keyboard stays there.
function keepingFocus(work) {
  const label = document.activeElement?.getAttribute("aria-label");
  work();
  if (label && !document.contains(document.activeElement?.closest("[aria-label]"))) {
    document.querySelector(`button[aria-label="${CSS.escape(label)}"]`)?.focus();
  }
}

async function attempt(work) {
  try {
    await work();
    say("");
  } catch (error) {
    say(error.message, "trouble");
  }
}

function say(text, kind = "") {
  $("message").textContent = text;
  $("message").className = kind;
}
