// From a snapshot to the page. Nothing here decides anything.

import { UNITS } from "./lot.js";

const PRIORITIES = ["critical", "high", "normal", "low"];
const SHADES = shadesOf(); // RGBA of each of 256 shades

/** The units: a card for each running task, as wide as the Web Workers that it has; the idle and the lost ones. */
export function drawUnits(parent, { running, assignments, worker, pictures, cancel }) {
  const byId = new Map(running.map((task) => [task.task_id, task]));
  // Units of tasks that another page started: no Web Worker of ours is at it, but the units are taken.
  const lost = running.filter((task) => task.worker !== worker).flatMap((task) => Array(task.units).fill(task));
  const slots = assignments.map((id) => byId.get(id) ?? null);
  for (let i = UNITS - 1; i >= 0 && lost.length > 0; i--) slots[i] ??= lost.pop();

  const cards = [];
  const places = new Map(); // how many cards a task has: one, unless its units are not side by side
  for (let first = 0; first < UNITS; ) {
    const task = slots[first];
    let width = 1;
    while (task && first + width < UNITS && slots[first + width]?.task_id === task.task_id) width += 1;
    const place = places.get(task?.task_id) ?? 0;
    places.set(task?.task_id, place + 1);
    cards.push(task ? taskCard(task, width, place, { worker, pictures, cancel }) : idleCard(first));
    first += width;
  }
  parent.replaceChildren(...cards);
}

function idleCard(index) {
  return element("li", { class: "unit idle" }, element("span", { class: "quiet" }, `unit ${index + 1} is idle`));
}

function taskCard(task, width, place, { worker, pictures, cancel }) {
  const lost = task.worker !== worker;
  const left = Math.max(0, (task.lease_until - Date.now()) / 1000);
  const note = lost
    ? `its page has gone; parks again in ${left.toFixed(1)} s`
    : task.state === "cancelling" ? "stopping" : task.attempt > 1 ? `attempt ${task.attempt}` : "";
  return element(
    "li",
    { class: `unit busy ${task.priority}${lost ? " lost" : ""}`, style: `grid-column: span ${width}`, "data-task": task.task_id },
    (!lost && pictures.get(task.task_id)?.canvas(place)) || element("div", { class: "picture" }),
    element("p", {}, element("strong", {}, `#${task.task_id}`), ` ${task.priority}, ${plural(task.units)}`),
    element("p", { class: "quiet" }, note),
    !lost && place === 0 && task.state === "running" && cancelButton(task, cancel),
  );
}

/** The lanes: what waits, by priority, each as wide as its units; and what is delayed. */
export function drawLanes(parent, { waiting, cancel }) {
  const head = waiting.find((task) => task.why === "no units" || task.why === "worker capacity")?.task_id;
  const lanes = PRIORITIES.map((priority) => {
    const tasks = waiting.filter((task) => task.priority === priority);
    return element(
      "li",
      { class: `lane ${priority}` },
      element("h3", {}, priority, element("span", { class: "quiet" }, tasks.length ? ` ${tasks.length}` : "")),
      element("ul", { "aria-label": `parked, ${priority}` }, ...tasks.map((task) => chip(task, task.task_id === head, cancel))),
    );
  });
  parent.replaceChildren(...lanes);
}

function chip(task, isHead, cancel) {
  const seconds = (time) => `${Math.max(0, (time - Date.now()) / 1000).toFixed(0)} s`;
  const note = isHead ? "head" : task.run_at ? `in ${seconds(task.run_at)}` : task.deadline ? `start by ${seconds(task.deadline)}` : "";
  return element(
    "li",
    {
      class: `chip ${task.priority}${isHead ? " head" : ""}${task.why === "delayed" ? " delayed" : ""}`,
      style: `--units: ${task.units}`,
      title: `task ${task.task_id}, ${plural(task.units)}: ${task.why}`,
      "data-task": task.task_id,
    },
    element("span", {}, element("strong", {}, `#${task.task_id}`), note && ` ${note}`),
    cancelButton(task, cancel),
  );
}

/** The mailbox: the latest outcomes, with the picture that came out of them. */
export function drawMailbox(parent, { outcomes, pictures }) {
  const cards = outcomes.map((outcome) =>
    element(
      "li",
      { class: `outcome ${outcome.status}`, "data-task": outcome.task_id },
      (outcome.status === "completed" && pictures.get(outcome.task_id)?.canvas(0)) || element("div", { class: "picture" }, outcome.status),
      element("p", {}, element("strong", {}, `#${outcome.task_id}`), ` ${outcome.status}`),
      element("p", { class: "quiet" }, detailOf(outcome)),
    ),
  );
  parent.replaceChildren(...(cards.length ? cards : [element("li", { class: "quiet empty" }, "Nothing here yet.")]));
}

function detailOf({ status, reason, secs, units, attempt }) {
  if (status !== "completed") return (reason ?? "").replaceAll("_", " ");
  return `${plural(units)}, ${secs.toFixed(1)} s${attempt > 1 ? `, attempt ${attempt}` : ""}`;
}

/** A picture in the making. It stays the same canvas from the first row to the mailbox. */
export class Picture {
  #canvases = [];

  constructor(width, height, attempt) {
    Object.assign(this, { width, height, attempt, complete: false });
    this.canvas(0);
  }

  /** The canvas for the n-th place where it is shown at once. */
  canvas(place) {
    if (!this.#canvases[place]) {
      const { width, height } = this;
      this.#canvases[place] = element("canvas", { class: "picture", width, height, "aria-hidden": "true" });
      if (place > 0) this.#canvases[place].getContext("2d").drawImage(this.#canvases[0], 0, 0);
    }
    return this.#canvases[place];
  }

  paintRow(y, shades) {
    const pixels = new ImageData(shades.length, 1);
    shades.forEach((shade, x) => pixels.data.set(SHADES.subarray(shade * 4, shade * 4 + 4), x * 4));
    for (const canvas of this.#canvases) canvas.getContext("2d").putImageData(pixels, 0, y);
  }

  /** From the result of a task, as it lies in the mailbox. */
  static of({ width, height, shades }) {
    const picture = new Picture(width, height, null);
    const bytes = Uint8Array.from(atob(shades), (character) => character.charCodeAt(0));
    for (let y = 0; y < height; y++) picture.paintRow(y, bytes.subarray(y * width, (y + 1) * width));
    picture.complete = true;
    return picture;
  }
}

function shadesOf() {
  const stops = [[16, 20, 38], [38, 70, 120], [70, 150, 170], [240, 214, 150], [255, 250, 240]];
  const shades = new Uint8ClampedArray(256 * 4);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const [from, to] = [stops[Math.floor(at)], stops[Math.ceil(at)]];
    from.forEach((value, channel) => (shades[i * 4 + channel] = value + (to[channel] - value) * (at % 1)));
    shades[i * 4 + 3] = 255;
  }
  return shades;
}

function cancelButton(task, cancel) {
  const button = element("button", { class: "cancel", "aria-label": `Cancel task ${task.task_id}`, title: "cancel" }, "×");
  button.addEventListener("click", () => cancel(task.task_id));
  return button;
}

function plural(units) {
  return units === 1 ? "1 unit" : `${units} units`;
}

export function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter(Boolean));
  return made;
}
