// What is around the lot: pools, figures, tenants, failures, workers.

import { byId, element, keep, say } from "./dom.js";
import { colourOf, counted, number, OUTCOMES, plural, reasonWords, short, shortUnits, soon, span, tenantName, units } from "./words.js";

const TENANTS_MOST = 8;
const TENANTS_TOLD = 20; // the gateway tells of no more
const WORKERS_MOST = 10;
const WORDS = { active: "active", paused: "paused", draining: "draining", disabled: "disabled" };

/** A small lot for each pool; the one that is open is marked. */
export function drawPools(lots, current) {
  const nav = byId("pools");
  nav.hidden = lots.every((lot) => lot.pool === current);
  keep(nav.firstElementChild, lots, (lot) => lot.pool, (lot) =>
    element("li", {}, element("a", { href: `#pool=${encodeURIComponent(lot.pool)}` },
      element("span", { class: "mini-name" }, element("b", {}, lot.pool), element("i", { class: "chip" })),
      element("span", { class: "mini", "aria-hidden": "true" }), element("small"))),
  (node, lot) => {
    const link = node.firstChild;
    if (lot.pool === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    const chip = node.querySelector(".chip");
    say(chip, lot.state === "active" ? "" : WORDS[lot.state]);
    chip.className = `chip ${lot.state}`;
    const total = Math.max(lot.max_units, lot.used_units, 1);
    const rest = lot.used_units - lot.running.tasks.reduce((sum, task) => sum + task.units, 0);
    const cars = rest > 0 ? [...lot.running.tasks, { task_id: "rest", units: rest }] : lot.running.tasks;
    keep(node.querySelector(".mini"), cars, (task) => task.task_id, () => element("span"), (car, task) => {
      car.style.width = `${(100 * task.units) / total}%`;
      car.dataset.colour = task.task_id === "rest" ? "others" : colourOf(task.tenant);
    });
    say(node.querySelector("small"), `${short(lot.used_units)} of ${short(lot.max_units)} · ${counted(lot.parked)} parked`);
  });
}

/** The numbers in a row above the lot. */
export function drawFigures(lot, latest) {
  const free = Math.max(lot.settings.max_units - lot.used_units, 0);
  const oldest = Math.max(0, ...lot.parked.lanes.map((lane) => lane.oldest_secs ?? 0));
  const figures = [
    lot.own ? null : { name: "free", value: short(free), note: `of ${units(lot.settings.max_units)}`, sign: free === 0 ? "full" : "open" },
    { name: "running", value: counted(lot.running), note: `${shortUnits(lot.used_units)} in use` },
    { name: "parked", value: counted(lot.parked), note: lot.parked.count ? `oldest ${span(oldest)}` : lot.parked.more ? "none of the first" : "nothing waits" },
    lot.delayed.count ? { name: "delayed", value: counted(lot.delayed), note: soon(lot.delayed.tasks[0].due_secs) } : null,
    latest ? { name: "started", value: short(latest.starts), note: "in the last hour" } : null,
    latest ? { name: "median wait", value: latest.wait === null ? "–" : span(latest.wait), note: "in the last hour" } : null,
    { name: "not completed", value: number(lot.mailbox.failed) + (lot.mailbox.more ? "+" : ""), note: "in the last hour", bad: lot.mailbox.failed > 0 },
  ].filter(Boolean);
  keep(byId("figures"), figures, (figure) => figure.name, (figure) =>
    element("div", {}, element("dt", {}, figure.name), element("dd"), element("dd", { class: "note" })),
  (node, figure) => {
    node.className = ["figure", figure.sign, figure.bad && "bad"].filter(Boolean).join(" ");
    say(node.children[1], figure.value);
    say(node.children[2], figure.note);
  });
}

/** Who holds how much of the pool, and who waits. */
export function drawTenants(lot) {
  const all = lot.tenants;
  const box = byId("tenants");
  if (all.length === 0) return nothing(box, "Nobody is here.");
  keep(box, all.slice(0, TENANTS_MOST), (row) => JSON.stringify(row.tenant), (row) =>
    element("div", { class: "share" }, element("div", { class: "share-name" }, element("span", { class: "swatch" }), element("b", { title: tenantName(row.tenant) }, tenantName(row.tenant)), element("span")),
      element("div", { class: "meter", "aria-hidden": "true" }, element("span"), element("i"))),
  (node, row) => {
    const part = lot.settings.max_units ? (100 * row.running_units) / lot.settings.max_units : 0;
    node.querySelector(".swatch").dataset.colour = colourOf(row.tenant);
    const [held, limit] = node.querySelector(".meter").children;
    held.style.width = `${Math.min(part, 100)}%`;
    held.dataset.colour = colourOf(row.tenant);
    limit.hidden = row.max_units === null;
    if (row.max_units !== null) limit.style.left = `${Math.min(100, (100 * row.max_units) / lot.settings.max_units)}%`;
    const holds = row.max_units === null ? shortUnits(row.running_units) : `${short(row.running_units)} of ${shortUnits(row.max_units)}`;
    const words = [`${holds} (${Math.round(part)} %)`, row.parked && `${number(row.parked)} parked`, row.weight !== 1 && `weight ${row.weight}`];
    say(node.querySelector(".share-name > span:last-child"), words.filter(Boolean).join(" · "));
  });
  others(box, all.length - TENANTS_MOST, all.length >= TENANTS_TOLD);
  return undefined;
}

/** What did not complete, by reason. retry(row) is offered where it may help. */
export function drawFailures(lot, retry) {
  const box = byId("failures");
  const { failures } = lot.mailbox;
  if (failures.length === 0) return nothing(box, "Nothing failed, expired or was dropped.");
  keep(box, failures.slice(0, 8), (row) => JSON.stringify([row.status, row.reason]), (row) =>
    element("div", { class: "failure" }, element("span", { class: `outcome ${row.status}`, "aria-hidden": "true" }, OUTCOMES[row.status].mark),
      element("div", {}, element("b", { title: reasonWords(row.reason) }, reasonWords(row.reason)), element("small")), element("span", { class: "count" }),
      lot.may.retry && lot.settings.archive && element("button", { type: "button", class: "quiet", onclick: (event) => retry(event.currentTarget.row) }, "Retry latest")),
  (node, row) => {
    say(node.querySelector("small"), `${row.status}, last ${span(row.secs)} ago`);
    say(node.querySelector(".count"), `×${number(row.count)}`);
    const button = node.querySelector("button");
    if (button) {
      button.row = row;
      button.setAttribute("aria-label", `Retry the latest task that ended with: ${reasonWords(row.reason)}`);
    }
  });
  return undefined;
}

/** Who works here. */
export function drawWorkers(lot) {
  byId("workers-card").hidden = lot.workers === null;
  if (lot.workers === null) return undefined;
  const box = byId("workers");
  if (lot.workers.count === 0) return nothing(box, "No worker has been seen for a minute. Start one: pgpark worker " + lot.pool + " --handler my_tasks:run");
  keep(box, lot.workers.list.slice(0, WORKERS_MOST), (row) => row.worker, (row) =>
    element("div", { class: "share" }, element("div", { class: "share-name" }, element("b", { title: row.worker }, row.worker), element("span")),
      element("div", { class: "meter", "aria-hidden": "true" }, element("span"))),
  (node, row) => {
    const most = row.max_units ?? lot.settings.max_units;
    node.querySelector(".meter span").style.width = `${Math.min(100, (100 * row.used_units) / most)}%`;
    say(node.querySelector(".share-name > span"), `${row.max_units === null ? shortUnits(row.used_units) : `${short(row.used_units)} of ${shortUnits(row.max_units)}`} · ${plural(row.running, "task")} · seen ${span(row.seen_secs)} ago`);
  });
  others(box, lot.workers.count - Math.min(lot.workers.list.length, WORKERS_MOST), lot.workers.more);
  return undefined;
}

function nothing(box, words) {
  others(box, 0);
  keep(box, [words], String, () => element("p", { class: "nothing" }, words));
}

/** How many there are besides those that are shown. */
function others(box, unseen, more = false) {
  if (unseen <= 0) {
    box.others?.remove();
    box.others = null;
    return;
  }
  if (!box.others) box.append((box.others = element("p", { class: "nothing others" })));
  say(box.others, `and ${number(unseen)}${more ? " or more" : ""} others`.replace(/^and 1 others/, "and another"));
}
