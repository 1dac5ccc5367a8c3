// The lot, the lanes before it and the mailbox behind it, from one answer of /pools/{pool}/lot.

import { byId, element, keep, rove, say } from "./dom.js";
import { baysPerRow, lineStep, park, rows } from "./lot.js";
import { apart, colourOf, counted, meet, number, OUTCOMES, plural, reasonWords, short, span, tenantName, soon, tiny, units, WHY } from "./words.js";

const LANE_MOST = 40; // parked tasks drawn in a lane; the others are a number
const LETTERS_MOST = 8;
const bays = new Map(); // by task id, of the pool that is shown
let shown = null; // that pool

/** Draws all of it. open(task, kind) is called with what was pressed. */
export function drawScene(lot, open) {
  if (shown !== lot.pool) bays.clear();
  shown = lot.pool;
  meet([...lot.tenants, ...lot.running.tasks, ...lot.mailbox.latest].map((row) => row.tenant));
  drawLot(lot, open);
  drawLanes(lot, open);
  drawDelayed(lot, open);
  drawMailbox(lot, open);
  const barred = lot.line.why !== null && lot.line.why !== undefined && lot.parked.count > 0;
  byId("scene").classList.toggle("barred", barred);
}

function drawLot(lot, open) {
  const parent = byId("lot");
  const width = parent.clientWidth || 600;
  const capacity = Math.max(lot.settings.max_units, lot.used_units);
  const perRow = baysPerRow(capacity, width);
  const rest = lot.used_units - lot.running.tasks.reduce((sum, task) => sum + task.units, 0);
  const tasks = [...lot.running.tasks].sort((a, b) => (b.secs ?? 0) - (a.secs ?? 0));
  if (rest > 0) tasks.push({ task_id: "others", units: rest, others: lot.running });
  const parked = park(tasks, capacity, perRow, bays);
  const count = Math.ceil(capacity / perRow);
  const step = lineStep(perRow, width);

  const strips = Array.from({ length: count }, (_, row) => ({ row, units: Math.min(perRow, capacity - row * perRow) }));
  keep(parent, strips, (strip) => strip.row, () => element("div", { class: "strip" }, element("div", { class: "bays" })), (node, strip) => {
    node.className = `strip ${strip.row % 2 ? "up" : "down"}${count === 1 ? " only" : ""}`;
    node.style.setProperty("--part", strip.units / perRow);
    const ground = node.firstChild;
    ground.style.setProperty("--line", `${(100 * step) / strip.units}%`);
    const over = strip.row * perRow + strip.units - lot.settings.max_units;
    ground.style.setProperty("--over", `${(100 * Math.min(Math.max(over, 0), strip.units)) / strip.units}%`);
    const here = parked.flatMap(({ task, pieces }) =>
      rows(pieces, perRow).map((piece, index, all) => ({ task, piece, index, all })).filter(({ piece }) => piece.row === strip.row));
    keep(ground, here, ({ task, index }) => `${task.task_id}/${index}`, ({ task, index }) => car(task, index, open), (carNode, item) => moveCar(carNode, item, strip));
  });
  rove(parent);

  const step2 = step === 1 ? "a bay is a unit" : `a line each ${short(step)} units`;
  say(byId("scale"), `${short(lot.used_units)} of ${units(lot.settings.max_units)} · ${step2}`);
  drawLegend(lot);
}

function car(task, index, open) {
  const parts = [element("span", { class: "glass" }), element("span", { class: "words" }, element("b"), element("i"))];
  const node = element("button", { class: "car arriving", type: "button", "data-stop": index === 0, onclick: () => node.task.others || open(node.task, "running") }, ...parts);
  if (index > 0) node.tabIndex = -1;
  requestAnimationFrame(() => requestAnimationFrame(() => node.classList.remove("arriving")));
  return node;
}

function moveCar(node, { task, piece, index, all }, strip) {
  node.task = task;
  node.style.left = `${(100 * piece.column) / strip.units}%`;
  node.style.width = `${(100 * piece.units) / strip.units}%`;
  const label = task.others
    ? `${counted(task.others)} running tasks in all; the smaller ones are drawn as one, ${units(task.units)}`
    : [`task ${task.task_id}`, units(task.units), task.priority, tenantName(task.tenant), `runs for ${span(task.secs)}`,
       `on ${apart(task.worker)}`, task.attempt > 1 && `attempt ${task.attempt}`, task.state === "cancelling" && "being cancelled",
       task.lease_secs < 0 && "its lease has lapsed"].filter(Boolean).join(", ");
  node.dataset.task = task.task_id;
  node.dataset.units = task.units;
  node.dataset.colour = task.others ? "others" : colourOf(task.tenant);
  node.dataset.priority = task.priority ?? "";
  node.classList.toggle("stopping", task.state === "cancelling");
  node.classList.toggle("lapsed", task.lease_secs < 0);
  node.classList.toggle("piece", all.length > 1);
  node.title = label;
  node.setAttribute("aria-label", index ? `another part of ${label}` : label);
  const [name, detail] = node.querySelectorAll("b, i");
  say(name, task.others ? "others" : `#${task.task_id}`);
  say(detail, index ? "continued" : `${short(task.units)} u${task.others ? "" : ` · ${tiny(task.secs)}`}`);
  node.classList.toggle("from", index > 0);
  node.classList.toggle("onward", index < all.length - 1);
}

function drawLegend(lot) {
  const tenants = lot.tenants.filter((row) => row.running > 0);
  const rowsShown = tenants.length > 1 || tenants[0]?.tenant ? tenants.slice(0, 9) : [];
  keep(byId("legend"), rowsShown, (row) => JSON.stringify(row.tenant), (row) =>
    element("span", { class: "key" }, element("span", { class: "swatch", "data-colour": colourOf(row.tenant) }), element("b", { title: tenantName(row.tenant) }, tenantName(row.tenant))));
}

function drawLanes(lot, open) {
  const head = lot.line.head?.task_id;
  keep(byId("lanes"), lot.parked.lanes, (lane) => lane.priority, (lane) =>
    element("div", { class: `lane ${lane.priority}`, role: "group" },
      element("div", { class: "lane-name" }, element("b", {}, lane.priority), element("span")),
      element("div", { class: "queue" })),
  (node, lane) => {
    const note = lane.count ? `${counted(lane)} · oldest ${span(lane.oldest_secs)}` : lane.more ? "none of the first" : "empty";
    say(node.querySelector(".lane-name span"), note);
    node.classList.toggle("empty", lane.count === 0);
    node.setAttribute("aria-label", `${lane.priority}: ${lane.count ? `${counted(lane)} parked, the oldest for ${span(lane.oldest_secs)}` : lane.more ? "none of the first that wait" : "nothing parked"}`);
    const queue = node.querySelector(".queue");
    const tasks = lane.tasks.slice(0, LANE_MOST);
    const unseen = lane.count - tasks.length;
    const items = unseen > 0 ? [...tasks, { task_id: "more", unseen, more: lane.more }] : tasks;
    keep(queue, items, (task) => task.task_id, (task) => (task.unseen ? element("span", { class: "tail" }) : waiting(open, "parked")), (carNode, task) => {
      if (task.unseen) {
        say(carNode, `+${number(task.unseen)}${task.more ? " or more" : ""}`);
        return;
      }
      carNode.task = { ...task, priority: lane.priority };
      carNode.dataset.task = task.task_id;
      carNode.dataset.units = task.units;
      carNode.dataset.colour = colourOf(task.tenant);
      carNode.style.setProperty("--share", Math.min(1, task.units / lot.settings.max_units));
      carNode.classList.toggle("head", task.task_id === head);
      carNode.classList.toggle("soon", task.deadline_secs !== null && task.deadline_secs < 10);
      say(carNode.querySelector("b"), `${short(task.units)} u`);
      say(carNode.querySelector("i"), tiny(task.secs));
      const label = [`task ${task.task_id}`, units(task.units), tenantName(task.tenant), `waits for ${span(task.secs)}`,
        task.task_id === head && "head of the line", WHY[task.why],
        task.deadline_secs !== null && `must start within ${span(task.deadline_secs)}`].filter(Boolean).join(", ");
      carNode.title = label;
      carNode.setAttribute("aria-label", label);
    });
    rove(queue);
  });
}

function waiting(open, kind) {
  const node = element("button", { class: "car parked arriving", type: "button", "data-stop": true, onclick: () => open(node.task, kind) },
    element("span", { class: "words" }, element("b"), element("i")));
  requestAnimationFrame(() => requestAnimationFrame(() => node.classList.remove("arriving")));
  return node;
}

function drawDelayed(lot, open) {
  const { delayed } = lot;
  const box = byId("delayed");
  if (delayed.count === 0) {
    keep(box, [], String, String);
    return;
  }
  keep(box, ["name", "list"], String, (part) => element("div", { class: part === "name" ? "lane-name" : "queue" }));
  const [name, queue] = box.children;
  keep(name, ["delayed", "count"], String, (part) => element(part === "delayed" ? "b" : "span", {}, part));
  say(name.lastChild, `${counted(delayed)} · ${soon(delayed.tasks[0].due_secs)}`);
  keep(queue, delayed.tasks.slice(0, 12), (task) => task.task_id, () => waiting(open, "delayed"), (node, task) => {
    node.task = task;
    node.classList.add("delayed");
    node.dataset.task = task.task_id;
    node.dataset.colour = colourOf(task.tenant);
    node.style.setProperty("--share", Math.min(1, task.units / lot.settings.max_units));
    say(node.querySelector("b"), `${short(task.units)} u`);
    say(node.querySelector("i"), `in ${tiny(task.due_secs)}`);
    const label = `task ${task.task_id}, ${units(task.units)}, ${tenantName(task.tenant)}, ${task.backoff ? `failed, again in ${span(task.due_secs)}` : `starts in ${span(task.due_secs)}`}`;
    node.title = label;
    node.setAttribute("aria-label", label);
  });
  rove(queue);
}

function drawMailbox(lot, open) {
  const latest = lot.mailbox.latest.slice(0, LETTERS_MOST);
  const items = latest.length ? latest : [{ task_id: "none" }];
  keep(byId("mailbox"), items, (row) => row.task_id, (row) =>
    row.task_id === "none" ? element("li", { class: "nothing" }, "Nothing here yet.")
      : element("li", {}, element("button", { type: "button", "data-stop": true, class: "letter", onclick: (event) => open(event.currentTarget.task, "ended") },
          element("span", { class: `outcome ${row.status}`, "aria-hidden": "true" }, OUTCOMES[row.status].mark),
          element("span", { class: "what" }, element("b", {}, `#${row.task_id}`), ` ${row.status}`, element("small")),
          element("time"))),
  (node, row) => {
    if (row.task_id === "none") return;
    node.firstChild.task = row;
    node.firstChild.dataset.task = row.task_id;
    say(node.querySelector("small"), row.status === "completed"
      ? `${units(row.units)}, ran ${span(row.run_secs)}, waited ${span(row.wait_secs)}` : reasonWords(row.reason));
    say(node.querySelector("time"), tiny(row.secs));
    node.firstChild.setAttribute("aria-label", `task ${row.task_id} ${row.status}, ${plural(row.units, "unit")}, ${span(row.secs)} ago`);
  });
  rove(byId("mailbox"));
}
