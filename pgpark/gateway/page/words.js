// How things are said: numbers, times, colours, and the sentence above the lot.

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const PRIORITIES = ["critical", "high", "normal", "low"];

export const number = (value) => NUMBER.format(value);
export const short = (value) => (value < 10_000 ? NUMBER.format(value) : SHORT.format(value));
export const plural = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;
export const counted = ({ count, more }) => number(count) + (more ? "+" : "");
export const units = (value) => plural(value, "unit");
export const shortUnits = (value) => `${short(value)} unit${value === 1 ? "" : "s"}`;

/** A number of seconds in at most two parts: 0.4 s, 12 s, 3 min, 1 h 20 min, 2 d. */
export function span(secs) {
  if (secs === null || secs === undefined) return "";
  const whole = Math.max(0, secs);
  if (whole < 1) return `${whole.toFixed(1)} s`;
  if (whole < 90) return `${Math.round(whole)} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 36) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  const days = Math.round(hours / 24);
  return days < 1000 ? `${days} d` : `${Math.round(days / 365)} years`;
}

/** The same in as few characters as can be. */
export function tiny(secs) {
  const whole = Math.max(0, secs ?? 0);
  if (whole < 100) return `${Math.floor(whole)}s`;
  if (whole < 6000) return `${Math.round(whole / 60)}m`;
  if (whole < 36 * 3600) return `${Math.round(whole / 3600)}h`;
  if (whole < 1000 * 86400) return `${Math.round(whole / 86400)}d`;
  return `${Math.round(whole / (365 * 86400))}y`;
}

export const soon = (secs) => (secs <= 0 ? "next at any moment" : `next in ${span(secs)}`);
export const tenantName = (tenant) => (tenant === null || tenant === undefined ? "no tenant" : apart(tenant));

const TURNING = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}\p{Script=Adlam}\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]/u;

/** A name that is written from right to left, set apart so that it does not turn the words around it. */
export const apart = (name) => (TURNING.test(name) ? `\u2068${name.replace(/[\u2066-\u2069]/g, "")}\u2069` : name);
export const reasonWords = (reason) => (reason === null || reason === undefined ? "no reason shown" : reason === "" ? "no reason given" : /^[a-z]+(_[a-z]+)+$/.test(reason) ? reason.replaceAll("_", " ") : reason);

const HUES = 8;

/** Tenants keep the colour that they got first, as long as the page is open; names decide the order of those that come at once. */
const given = new Map();
export function colourOf(tenant) {
  if (tenant === null || tenant === undefined) return "none";
  if (!given.has(tenant)) given.set(tenant, String(given.size % HUES));
  return given.get(tenant);
}
export function meet(tenants) {
  for (const tenant of [...new Set(tenants)].filter((t) => t !== null && t !== undefined).sort()) colourOf(tenant);
}

/** What is going on, for somebody who has never seen a lot. */
export function sentence(lot) {
  const { running, parked, line, settings, used_units: used, own } = lot;
  const whose = own ? (own.length === 1 ? `of ${apart(own[0])} ` : "of your tenants ") : "";
  const holds = running.count === 0
    ? `Nothing ${whose}runs.`
    : `${counted(running)} ${running.count === 1 ? "task" : "tasks"} ${whose}${running.count === 1 ? "holds" : "hold"} ${number(used)} of ${units(settings.max_units)}.`;
  if (parked.count === 0) return parked.more ? `${holds} None of the first that wait is ${own.length === 1 ? `of ${own[0]}` : "of your tenants"}.` : `${holds} Nothing waits.`;
  const waits = `${counted(parked)} ${parked.count === 1 ? "waits" : "wait"}`;
  const why = {
    paused: lot.state === "disabled" ? "the pool is disabled, so nothing starts." : "the pool is paused, so nothing starts.",
    "no worker": "no worker has been seen for a minute.",
    "tenant limit": "those that wait are at the limit of their tenant.",
  }[line.why];
  if (why) return `${holds} ${waits}: ${why}`;
  if (!line.head) return `${holds} ${waits}.`;
  return `${holds} ${waits}: ${headWords(line)}`;
}

export function headWords({ head, free_units: free, largest_room: room }) {
  const who = `task ${head.task_id} is at the head and needs ${units(head.units)}`;
  if (head.why === "worker capacity") return `${who}; no worker has more than ${number(Math.max(0, room ?? 0))} free.`;
  return `${who}, ${number(free)} ${free === 1 ? "is" : "are"} free.`;
}

/** Why a parked task is not running, in a few words. */
export const WHY = {
  "may start": "a free worker will take it",
  "no units": "does not fit into the free units",
  "held for head": "waits behind the head",
  "worker capacity": "no worker has that much room",
  "tenant limit": "its tenant is at its limit",
  paused: "the pool is paused",
};

export const OUTCOMES = {
  completed: { mark: "✓", word: "completed" },
  failed: { mark: "✕", word: "failed" },
  expired: { mark: "!", word: "expired" },
  dropped: { mark: "–", word: "dropped" },
};
