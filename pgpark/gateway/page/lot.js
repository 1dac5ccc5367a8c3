// Where tasks stand in the lot. Units have no places of their own in pgpark; here each task keeps the bays that it was first
// drawn in, so that nothing moves but what comes and goes. Knows nothing of the page.

/**
 * Bays for tasks: a list of {task, pieces: [{start, units}]}, in units from 0. `kept` (a Map from task id to pieces) is what
 * was drawn before; it is brought up to date. A task stands in one piece where there is room for that in one row, or at least
 * side by side; else in the pieces that are free.
 */
export function park(tasks, capacity, perRow, kept) {
  const ids = new Set(tasks.map((task) => task.task_id));
  for (const [id, pieces] of kept) {
    const task = tasks.find((one) => one.task_id === id);
    const whole = pieces.reduce((sum, piece) => sum + piece.units, 0);
    if (!ids.has(id) || task.units !== whole || pieces.some((piece) => piece.start + piece.units > capacity)) kept.delete(id);
  }
  let free = gaps([...kept.values()].flat(), capacity);
  for (const task of tasks) {
    if (kept.has(task.task_id)) continue;
    const pieces = fit(task.units, free, perRow);
    kept.set(task.task_id, pieces);
    free = gaps([...kept.values()].flat(), capacity);
  }
  return tasks.map((task) => ({ task, pieces: kept.get(task.task_id) }));
}

function gaps(taken, capacity) {
  const free = [];
  let at = 0;
  for (const piece of [...taken].sort((a, b) => a.start - b.start)) {
    if (piece.start > at) free.push({ start: at, units: piece.start - at });
    at = Math.max(at, piece.start + piece.units);
  }
  if (at < capacity) free.push({ start: at, units: capacity - at });
  return free;
}

function fit(units, free, perRow) {
  const inRows = free.flatMap((gap) => rows([gap], perRow));
  const [best] = [inRows, free]
    .map((list) => list.filter((gap) => gap.units >= units).sort((a, b) => a.units - b.units || a.start - b.start)[0])
    .filter(Boolean);
  if (best) return [{ start: best.start, units }];
  const pieces = [];
  let left = units;
  for (const gap of [...free].sort((a, b) => b.units - a.units)) {
    if (left === 0) break;
    pieces.push({ start: gap.start, units: Math.min(gap.units, left) });
    left -= pieces.at(-1).units;
  }
  return pieces.sort((a, b) => a.start - b.start);
}

/** Pieces cut where rows end. */
export function rows(pieces, perRow) {
  const cut = [];
  for (const { start, units } of pieces) {
    for (let at = start; at < start + units; ) {
      const end = Math.min(start + units, (Math.floor(at / perRow) + 1) * perRow);
      cut.push({ start: at, units: end - at, row: Math.floor(at / perRow), column: at % perRow });
      at = end;
    }
  }
  return cut;
}

/** How many bays a row has, so that a lot of this many units is neither a thread nor a tower: width in pixels. */
export function baysPerRow(capacity, width) {
  const most = Math.max(1, Math.floor(width / 34)); // bays wide enough for a car
  const rowsWanted = capacity <= most && capacity <= 12 ? 1 : capacity <= 2 * most ? 2 : 4;
  return Math.ceil(capacity / rowsWanted);
}

/** Units between two painted lines, so that lines are not closer than they can be seen. */
export function lineStep(perRow, width) {
  const least = (14 * perRow) / Math.max(width, 1);
  if (least <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least);
}
