// The last hour, drawn: what ended in each minute, how long tasks waited before they started, and units in use.

import { byId, drawn, element, keep } from "./dom.js";
import { short, span } from "./words.js";

const WIDTH = 300;
const HEIGHT = 84;
const KINDS = ["completed", "failed", "expired", "dropped"];

/** rows: of park_history, oldest first; null: the gateway has none. Returns what the figures above the lot say of the hour. */
export function drawHistory(rows) {
  byId("history").hidden = !rows || rows.length === 0;
  if (!rows || rows.length === 0) return null;
  const starts = rows.reduce((sum, row) => sum + (row.started ?? 0), 0);
  const ended = rows.map((row) => KINDS.map((kind) => row[kind] ?? 0));
  const totals = ended.map((kinds) => kinds.reduce((a, b) => a + b, 0));
  const sum = totals.reduce((a, b) => a + b, 0);
  const waits = rows.map((row) => row.wait_p50_secs ?? null);
  const worst = rows.map((row) => row.wait_p95_secs ?? null);
  const charts = [
    { name: "Ended per minute", now: sum ? `${short(sum)} in the hour, at most ${short(Math.max(...totals))}` : "nothing yet", plot: () => bars(ended, Math.max(1, ...totals)) },
    { name: "Wait before the start", now: starts ? `median of a minute up to ${longest(waits)}, 95 of 100 up to ${longest(worst)}` : "nothing started yet", plot: () => lines([worst, waits], Math.max(0.001, ...worst.concat(waits).filter((w) => w !== null)), ["faint", "strong"]) },
  ];
  const made = charts.map((chart) =>
    element("figure", { class: "chart" },
      element("figcaption", {}, element("b", {}, chart.name), element("span", {}, chart.now)),
      chart.plot(),
      element("div", { class: "axis", "aria-hidden": "true" }, element("span", {}, "an hour ago"), element("span", {}, "now"))));
  byId("charts").replaceChildren(...made, key());
  return { starts, wait: median(rows) };
}

const longest = (waits) => span(Math.max(0, ...waits.filter((wait) => wait !== null)));

/** The median wait of the hour, from those of the minutes, each counted as often as tasks started in it. */
function median(rows) {
  const known = rows.filter((row) => row.started > 0 && row.wait_p50_secs !== null).sort((a, b) => a.wait_p50_secs - b.wait_p50_secs);
  const all = known.reduce((sum, row) => sum + row.started, 0);
  let seen = 0;
  for (const row of known) {
    seen += row.started;
    if (seen * 2 >= all) return row.wait_p50_secs;
  }
  return null;
}

function plane(title) {
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
  for (const part of [0.25, 0.5, 0.75]) svg.append(drawn("line", { class: "rule", x1: 0, x2: WIDTH, y1: HEIGHT * part, y2: HEIGHT * part }));
  return svg;
}

function bars(stacks, most) {
  const svg = plane(`tasks that ended in each of ${stacks.length} minutes; at most ${most}`);
  const step = WIDTH / stacks.length;
  stacks.forEach((kinds, index) => {
    let y = HEIGHT;
    kinds.forEach((count, kind) => {
      if (!count) return;
      const height = Math.max((count / most) * (HEIGHT - 4), 1);
      y -= height;
      svg.append(drawn("rect", { class: KINDS[kind], x: index * step + step * 0.1, y, width: step * 0.8, height }));
    });
  });
  return svg;
}

function lines(series, most, classes) {
  const svg = plane(`waits in seconds, at most ${most.toFixed(1)}`);
  series.forEach((values, index) => {
    const step = WIDTH / values.length;
    let path = "";
    let pen = false;
    values.forEach((value, at) => {
      if (value === null) return void (pen = false);
      const [x, y] = [at * step + step / 2, HEIGHT - 2 - (value / most) * (HEIGHT - 6)];
      path += `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}${pen ? "" : "h0.01"}`;
      pen = true;
    });
    svg.append(drawn("path", { class: `wait ${classes[index]}`, d: path }));
  });
  return svg;
}

function key() {
  const box = element("div", { class: "legend" });
  const names = [...KINDS.map((kind) => [kind, kind]), ["wait-strong", "median wait"], ["wait-faint", "95 of 100 wait less"]];
  keep(box, names, ([kind]) => kind, ([kind, word]) => element("span", { class: "key" }, element("span", { class: `swatch ${kind}` }), word));
  return box;
}
