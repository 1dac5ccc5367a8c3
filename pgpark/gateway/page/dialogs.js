// Dialogs and notes: what a task is, what may be done with it, and questions before what cannot be undone.

import { byId, element } from "./dom.js";
import { span, tenantName, units, WHY, reasonWords } from "./words.js";

/** Shows a dialog; resolves with the value of the button, "" when it was closed. */
function show(title, body, buttons) {
  const dialog = byId("dialog");
  const before = document.activeElement;
  const form = element("form", { method: "dialog" },
    element("h2", { id: "dialog-title" }, title), ...body,
    element("div", { class: "buttons" }, ...buttons));
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      before?.isConnected && before.focus();
      resolve(dialog.returnValue);
    }, { once: true });
  });
}

const button = (value, words, kind = "") => element("button", { type: "submit", value, class: kind, formnovalidate: value === "" }, words);

export async function confirm(title, words, yes, kind = "primary") {
  return (await show(title, [element("p", {}, words)], [button("", "Leave it"), button("yes", yes, kind)])) === "yes";
}

/** Asks for a number of units; null: none was given. */
export async function askUnits(pool, now, used) {
  const input = element("input", { id: "new-units", type: "number", min: 1, max: 2147483647, step: 1, required: true, value: now, inputmode: "numeric" });
  const given = await show(`Resize ${pool}`, [
    element("p", {}, `${units(now)} now, ${used} in use. A smaller pool stops nothing that runs: nothing new starts until it fits.`),
    element("label", { for: "new-units" }, "Units"), input,
  ], [button("", "Leave it"), button("yes", "Resize", "primary")]);
  return given === "yes" ? Number(input.value) : null;
}

/** What is known of a task. Resolves with "cancel", "retry" or "". */
export function showTask(task, kind, may) {
  const facts = {
    running: () => [["units", task.units], ["priority", task.priority], ["tenant", tenantName(task.tenant)], ["worker", task.worker],
      ["attempt", task.attempt], ["runs for", span(task.secs)],
      ["lease", task.lease_secs < 0 ? "has lapsed: its worker may be lost" : `renewed, ${span(task.lease_secs)} left`],
      ["must end within", task.run_secs_left === null ? null : span(task.run_secs_left)]],
    parked: () => [["units", task.units], ["priority", task.priority], ["tenant", tenantName(task.tenant)], ["waits for", span(task.secs)],
      ["ahead of it", task.position], ["why", WHY[task.why]], ["must start within", task.deadline_secs === null ? null : span(task.deadline_secs)],
      ["attempts so far", task.attempt || null]],
    delayed: () => [["units", task.units], ["priority", task.priority], ["tenant", tenantName(task.tenant)], ["parks in", span(task.due_secs)],
      ["why", task.backoff ? "it failed, and is tried again after a pause" : "its client asked for that time"], ["attempts so far", task.attempt || null]],
    ended: () => [["outcome", task.status], ["reason", task.status === "completed" ? null : reasonWords(task.reason)], ["units", task.units],
      ["priority", task.priority], ["tenant", tenantName(task.tenant)], ["attempt", task.attempt || null], ["waited", span(task.wait_secs) || null],
      ["ran", span(task.run_secs) || null], ["ended", `${span(task.secs)} ago`]],
  }[kind]();
  const list = element("dl", { class: "facts" }, ...facts.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  const buttons = [button("", "Close")];
  if (may.retry && ((kind === "delayed" && task.backoff) || (kind === "ended" && task.retry))) buttons.push(button("retry", "Retry now", "primary"));
  if (may.cancel && kind !== "ended" && task.state !== "cancelling") buttons.push(button("cancel", "Cancel this task", "danger"));
  return show(`Task ${task.task_id}`, [list], buttons);
}

const NOTE_MS = 6000;

/** A note that goes away. */
export function note(words, kind = "") {
  const made = element("p", { class: `toast ${kind}` }, words);
  byId("toasts").append(made);
  setTimeout(() => made.remove(), NOTE_MS);
}
