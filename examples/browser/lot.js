// The page's handle on the lot: starts the five Web Workers and passes statements to Postgres in one of them.

export const UNITS = 4;

export class Lot extends EventTarget {
  #answers = new Map();
  #next = 1;
  #worker;

  /** Events: phase, ready, changed, trouble, broken (from the lot) and row (from a painter); data is in `detail`. */
  constructor() {
    super();
    this.#worker = new Worker(new URL("./lot.worker.js", import.meta.url), { type: "module", name: "lot" });
    this.#worker.onmessage = ({ data }) => this.#heard(data);
    this.#worker.onerror = (event) => this.#tell("broken", { message: event.message ?? "the lot's worker did not start" });
    this.painters = Array.from({ length: UNITS }, (_, index) => {
      const painter = new Worker(new URL("./painter.js", import.meta.url), { name: `unit ${index + 1}` });
      painter.onmessage = ({ data }) => this.#tell("row", data);
      return painter;
    });
  }

  /** store: "idb" or "opfs"; null takes what is best here. */
  start(store) {
    const ports = this.painters.map((painter) => {
      const { port1, port2 } = new MessageChannel();
      painter.postMessage({ port: port1 }, [port1]);
      return port2;
    });
    this.#worker.postMessage({ kind: "start", ports, store }, ports);
  }

  /** Runs a statement and returns its rows; throws with Postgres's message and hint. */
  sql(sql, params = []) {
    const id = this.#next++;
    this.#worker.postMessage({ kind: "call", id, sql, params });
    return new Promise((resolve, reject) => this.#answers.set(id, { resolve, reject }));
  }

  /** Submits tasks: objects with the arguments of park_submit. Returns a row for each. */
  submit(tasks) {
    return this.sql("select * from pgpark.park_submit_many('browser', $1)", [tasks]);
  }

  /** Throws the database away; reload the page after it. */
  erase() {
    return new Promise((resolve) => {
      this.addEventListener("erased", resolve, { once: true });
      this.#worker.postMessage({ kind: "erase" });
    });
  }

  #heard(data) {
    if (data.kind !== "answer") return this.#tell(data.kind, data);
    const { resolve, reject } = this.#answers.get(data.id);
    this.#answers.delete(data.id);
    if (data.error) reject(new Error(data.error));
    else resolve(data.rows);
  }

  #tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}
