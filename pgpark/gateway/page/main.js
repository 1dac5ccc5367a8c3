// The page: signs in, asks the gateway again and again while somebody looks, and does what is pressed.

import * as api from "./api.js";
import { drawHistory } from "./charts.js";
import { askUnits, confirm, note, showTask } from "./dialogs.js";
import { byId, say } from "./dom.js";
import { drawFailures, drawFigures, drawPools, drawTenants, drawWorkers } from "./panels.js";
import { drawScene } from "./scene.js";
import { apart, sentence, span } from "./words.js";

const LOOK_MS = 1000;
const LOTS_MS = 5000;
const HISTORY_MS = 15_000;
const LONGEST_PAUSE_MS = 10_000;

const seen = { lots: [], lot: null, hour: null, at: 0, failures: 0 };
let round = 0; // goes up with each change of pool or token: answers to what was asked before are thrown away
let timer = null;
const due = { lots: 0, history: 0 };

// -- the address and the token ----------------------------------------------------------------------------------------

/** #token=... is taken out of the address at once; #pool=... stays. */
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("token")) {
    api.token.set(given.get("token"));
    given.delete("token");
    history.replaceState(null, "", given.size ? `#${given}` : location.pathname + location.search);
    begin();
  }
  return given.get("pool");
}

const wantedPool = () => readAddress() ?? seen.lots[0]?.pool ?? null;

function begin() {
  round += 1;
  Object.assign(seen, { lots: [], lot: null, hour: null, failures: 0 });
  Object.assign(due, { lots: 0, history: 0 });
}

function askToken(complaint = "") {
  clearTimeout(timer);
  byId("main").hidden = byId("pools").hidden = byId("sign-out").hidden = true;
  byId("banner").hidden = true;
  byId("sign-in").hidden = false;
  say(byId("sign-in-error"), complaint);
  connection("out", "signed out");
  byId("token").focus();
}

// -- looking ------------------------------------------------------------------------------------------------------------

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  if (api.token.get() === null) return void askToken();
  const mine = round;
  let pause = LOOK_MS;
  try {
    const now = performance.now();
    if (now >= due.lots) {
      const { pools } = await api.lots();
      if (mine !== round) return;
      seen.lots = pools;
      due.lots = now + LOTS_MS;
    }
    const pool = wantedPool();
    if (pool === null) {
      showNoPool();
      banner("There are no pools yet. Make one: pgpark pool put NAME --max-units N", false);
    } else {
      await lookAt(pool, mine);
    }
    if (mine !== round) return;
    seen.failures = 0;
    seen.at = performance.now();
    connection("live", "live");
  } catch (error) {
    if (mine !== round) return;
    if (!(error instanceof api.ApiError)) throw error;
    pause = troubled(error);
    if (pause === null) return;
  }
  timer = setTimeout(look, pause);
}

async function lookAt(pool, mine) {
  const lot = await api.lot(pool);
  if (mine !== round || pool !== wantedPool()) return;
  const fresh = seen.lot?.pool !== pool;
  seen.lot = lot;
  if (fresh) seen.hour = null;
  byId("banner").hidden = true;
  draw();
  if (fresh || performance.now() >= due.history) {
    due.history = performance.now() + HISTORY_MS;
    seen.hour = drawHistory(await hour(pool));
    drawFigures(seen.lot, seen.hour);
  }
}

/** The last hour; null for who sees its own tasks alone: these are numbers of the pool. */
async function hour(pool) {
  if (seen.lot.own) return null;
  try {
    return (await api.history(pool)).steps;
  } catch (error) {
    if (error instanceof api.ApiError && [403, 404].includes(error.status)) return null;
    throw error;
  }
}

/** Says what is wrong, and returns in how many milliseconds to look again; null: not before somebody does something. */
function troubled(error) {
  if (error.status === 401) {
    api.token.forget();
    begin();
    askToken("This token is not known here. It may have been revoked, or have expired.");
    return null;
  }
  seen.failures += 1;
  const pause = error.retryAfter ? error.retryAfter * 1000 : Math.min(LOOK_MS * 2 ** (seen.failures - 1), LONGEST_PAUSE_MS);
  if (error.status === 403) {
    banner(`This token may not see that: ${error.message}. ${error.hint}`, true);
    connection("out", "not allowed");
    showNoPool();
  } else if (error.status === 404) {
    banner(`${error.message}. ${error.hint}`, true);
    connection("out", "no such pool");
    showNoPool();
    due.lots = 0;
  } else if (error.status === 429) {
    connection("slow", `slowed down for ${span(pause / 1000)}`);
  } else {
    const last = seen.at ? ` What you see is from ${span((performance.now() - seen.at) / 1000)} ago.` : "";
    banner(`Connection lost: ${error.message}.${last} Trying again.`, true);
    connection("lost", "connection lost");
    document.body.classList.add("stale");
  }
  return pause;
}

/** The pool that was asked for is not shown; the others can be chosen. */
function showNoPool() {
  byId("main").hidden = byId("sign-in").hidden = true;
  byId("sign-out").hidden = false;
  seen.lot = null;
  drawPools(seen.lots, null);
}

function connection(kind, words) {
  byId("link").className = `link ${kind}`;
  say(byId("link-text"), words);
  if (kind === "live") document.body.classList.remove("stale");
}

function banner(words, bad) {
  const node = byId("banner");
  node.hidden = false;
  node.classList.toggle("bad", bad);
  say(node, words);
}

// -- drawing ------------------------------------------------------------------------------------------------------------

let announced = "";

function draw() {
  const { lot } = seen;
  byId("sign-in").hidden = true;
  byId("main").hidden = false;
  byId("sign-out").hidden = api.token.get() === null;
  document.title = `${lot.pool}: ${lot.used_units} of ${lot.settings.max_units} · pgpark`;
  say(byId("pool-name"), lot.pool);
  say(byId("state"), lot.state);
  byId("state").className = `chip ${lot.state}`;
  byId("own").hidden = !lot.own;
  if (lot.own) say(byId("own"), `only tasks of ${lot.own.map(apart).join(", ")}`);
  say(byId("sentence"), sentence(lot));
  const why = `${lot.pool} is ${lot.state}${lot.line.why ? `; the line waits: ${lot.line.why}` : ""}`;
  if (why !== announced) say(byId("announce"), (announced = why));
  const pause = byId("pause");
  pause.hidden = byId("resize").hidden = !lot.may.change;
  say(pause, lot.state === "active" ? "Pause" : "Resume");
  drawFigures(lot, seen.hour);
  drawPools(seen.lots, lot.pool);
  drawScene(lot, open);
  drawTenants(lot);
  drawFailures(lot, (row) => retry(row.task_id));
  drawWorkers(lot);
}

// -- doing --------------------------------------------------------------------------------------------------------------

/** Does something at the gateway, says how it went, and looks at once. */
async function act(deed, done) {
  try {
    const answer = await deed();
    note(typeof done === "function" ? done(answer) : done);
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    if (error.status === 401) troubled(error);
    else note([error.message, error.hint].filter(Boolean).join(". "), "bad");
  }
  due.lots = 0;
  if (api.token.get() !== null || !byId("main").hidden) look();
}

async function open(task, kind) {
  const { pool, may } = seen.lot;
  const chosen = await showTask(task, kind, may);
  if (chosen === "retry") await retry(task.task_id);
  if (chosen === "cancel" && (await confirm(`Cancel task ${task.task_id}?`, kind === "running"
    ? "Its worker is told to stop; what it did so far is lost. Its outcome will be dropped."
    : "It will not run. Its outcome will be dropped.", "Cancel the task", "danger"))) {
    await act(() => api.cancel(pool, task.task_id), `Task ${task.task_id}: ${kind === "running" ? "its worker is told to stop" : "cancelled"}`);
  }
}

const retry = (id) => act(() => api.retry(seen.lot.pool, id), (answer) =>
  answer.reason === "duplicate" ? `Task ${id} was retried already, as task ${answer.task_id}`
    : answer.task_id === id ? `Task ${id} is parked again` : `Task ${id} is submitted once more, as task ${answer.task_id}`);

byId("pause").addEventListener("click", async () => {
  const { pool, state } = seen.lot;
  if (state !== "active") return act(() => api.setState(pool, "active"), `${pool} is active`);
  if (await confirm(`Pause ${pool}?`, "Nothing more starts until it is resumed. What runs goes on, and tasks are still accepted.", "Pause")) {
    await act(() => api.setState(pool, "paused"), `${pool} is paused`);
  }
  return undefined;
});

byId("resize").addEventListener("click", async () => {
  const { pool, settings, used_units: used } = seen.lot;
  const units = await askUnits(pool, settings.max_units, used);
  if (units !== null && units !== settings.max_units) await act(() => api.resize(pool, units), `${pool} has ${units} units`);
});

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  api.token.set(byId("token").value.trim());
  byId("token").value = "";
  begin();
  look();
});

byId("sign-out").addEventListener("click", () => {
  api.token.forget();
  begin();
  askToken();
});

// -- light and dark -----------------------------------------------------------------------------------------------------

const THEME = "pgpark.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function wear(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

wear(localStorage.getItem(THEME));
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const other = now === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, other);
  wear(other);
});

// -- at work ------------------------------------------------------------------------------------------------------------

addEventListener("hashchange", () => {
  round += 1;
  due.history = 0;
  look();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) connection("out", "waits while hidden");
  else look();
});
let width = 0;
new ResizeObserver(() => {
  if (byId("lot").clientWidth !== width) {
    width = byId("lot").clientWidth;
    if (seen.lot) draw();
  }
}).observe(byId("lot"));
readAddress();
look();
