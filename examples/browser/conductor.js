// A pgpark worker: claims tasks, has them painted by Web Workers, renews their leases and finishes them, all through
// the functions that every other language calls. One unit is one Web Worker: a task of three units is split into three
// shares that run on three of them at once, and its units are free when the last of the three has stopped.

const LONGEST_SLEEP_MS = 30_000; // a notification is a hint; look now and then all the same
const SHORTEST_SLEEP_MS = 50;

export class Conductor {
  #held = new Map(); // by task id: { task, painters, rows, open, outcome }
  #wake = () => {};
  #poked = false;
  #beating = false;

  /**
   * query(sql, params) gives rows; ports lead to the Web Workers, one unit each; changed() is called when who works
   * on what has changed; leaseSecs is that of the pool.
   */
  constructor({ query, pool, name, ports, leaseSecs, changed, failed }) {
    Object.assign(this, { query, pool, name, leaseSecs, changed, failed });
    this.painters = ports.map((port, index) => ({ port, index, task_id: null }));
    for (const painter of this.painters) {
      painter.port.onmessage = ({ data }) => this.#heard(data);
    }
  }

  /** Works until the page goes away. */
  async run() {
    setInterval(() => this.#guarded(() => this.#heartbeat()), (this.leaseSecs * 1000) / 3);
    for (;;) {
      await this.#guarded(async () => {
        await this.#writeOutcomes();
        this.#poked = false;
        await this.#claim();
        await this.#sleep();
      });
    }
  }

  /** A notification on the channel of the pool: a task may start, or one of ours was cancelled. */
  notified(message) {
    if (message === "cancel") this.#guarded(() => this.#heartbeat());
    else this.#poke();
  }

  /** Who works on what: an entry per Web Worker, null for an idle one. */
  assignments() {
    return this.painters.map((painter) => painter.task_id);
  }

  async #claim() {
    const idle = this.painters.filter((painter) => painter.task_id === null);
    if (idle.length === 0) return;
    const tasks = await this.query("select * from pgpark.park_claim($1, worker => $2, max_tasks => $3, max_units => $4)", [
      this.pool, this.name, idle.length, this.painters.length,
    ]);
    for (const task of tasks) this.#start(task);
    if (tasks.length > 0) this.changed();
  }

  // A Web Worker is ours again when the units of its task are free, so a claim cannot bring more than are idle.
  #start(task) {
    const idle = this.painters.filter((painter) => painter.task_id === null);
    const painters = neighbours(idle, task.units);
    const run = { task, painters, rows: [], open: painters.length, outcome: null };
    this.#held.set(task.task_id, run);
    painters.forEach((painter, share) => {
      painter.task_id = task.task_id;
      painter.port.postMessage({
        task_id: task.task_id, attempt: task.attempt, share, shares: painters.length, scene: task.payload,
      });
    });
  }

  #heard({ task_id, attempt, rows, error }) {
    const run = this.#held.get(task_id);
    if (run?.task.attempt !== attempt) return;
    run.open -= 1;
    if (rows) run.rows.push(...rows);
    if (error) run.error = error;
    if (run.open === 0) {
      run.outcome = outcomeOf(run);
      this.#poke();
    }
  }

  // Outcome, freed units and the wake-up of what waits are one transaction.
  async #writeOutcomes() {
    const ready = [...this.#held.values()].filter((run) => run.outcome);
    if (ready.length === 0) return;
    await this.query("select * from pgpark.park_finish_many($1)", [ready.map((run) => run.outcome)]);
    for (const run of ready) {
      this.#held.delete(run.task.task_id);
      for (const painter of run.painters) painter.task_id = null;
    }
    this.changed();
  }

  async #heartbeat() {
    if (this.#beating) return;
    this.#beating = true;
    try {
      const ids = [...this.#held.values()].filter((run) => !run.outcome).map((run) => run.task.task_id);
      const rows = await this.query("select stop from pgpark.park_heartbeat($1, $2, $3) as stop", [this.pool, this.name, ids]);
      for (const { stop } of rows) this.#stop(this.#held.get(stop));
    } finally {
      this.#beating = false;
    }
  }

  #stop(run) {
    if (!run || run.stopped) return;
    run.stopped = true;
    for (const painter of run.painters) painter.port.postMessage({ stop: run.task.task_id });
  }

  // Until something may have changed: a notification, a share that is done, the next timer of the pool, the backstop.
  async #sleep() {
    const [timers] = await this.query("select next_due from pgpark.park_maintain($1)", [this.pool]);
    if (this.#poked) return;
    const due = timers.next_due ? timers.next_due - Date.now() : LONGEST_SLEEP_MS;
    await new Promise((resolve) => {
      this.#wake = resolve;
      setTimeout(resolve, Math.min(Math.max(due, SHORTEST_SLEEP_MS), LONGEST_SLEEP_MS));
    });
  }

  #poke() {
    this.#poked = true;
    this.#wake();
  }

  // What goes wrong is shown, and tried again a second later.
  async #guarded(work) {
    try {
      await work();
    } catch (error) {
      this.failed(error);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

// Side by side if there is such a place, so that the page can draw a task as one piece.
function neighbours(idle, count) {
  for (let first = 0; first + count <= idle.length; first++) {
    const run = idle.slice(first, first + count);
    if (run[count - 1].index - run[0].index === count - 1) return run;
  }
  return idle.slice(0, count);
}

// A stopped run fails; the database knows whether it was cancelled and gives the reason.
function outcomeOf({ task, rows, stopped, error }) {
  const { task_id, attempt, payload } = task;
  if (stopped) return { task_id, attempt, status: "failed" };
  if (error) return { task_id, attempt, status: "failed", reason: error };
  rows.sort((one, other) => one.y - other.y);
  const shades = rows.flatMap((row) => [...row.shades]);
  return {
    task_id, attempt, status: "completed",
    result: { width: payload.width, height: payload.height, shades: btoa(String.fromCharCode(...shades)) },
  };
}
