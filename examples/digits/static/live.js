// Shows the server's counters, asked for once a second while the page is visible.

import { stats } from "./server.js";

const POLL = 1000; // milliseconds
const FEWEST_COLUMNS = 8;
const MOST_LABELS = 16;
const find = (id) => document.getElementById(id);

export class Live {
  /** @param {(error: ?Error) => void} onContact called with null when the server answers */
  constructor(onContact) {
    this.onContact = onContact;
    this.workers = new Map(); // the newest counters of each worker process seen
    this.polling = false;
    document.addEventListener("visibilitychange", () => this.#poll());
    this.#poll();
  }

  /** Ask now; return the sums over the workers seen, or null if there was no answer. */
  async refresh() {
    try {
      const worker = await stats();
      this.workers.set(worker.pid, worker);
    } catch (error) {
      this.onContact(error);
      return null;
    }
    this.onContact(null);
    const total = this.#total();
    show(total);
    return total;
  }

  async #poll() {
    if (this.polling) return;
    this.polling = true;
    while (document.visibilityState === "visible") {
      await this.refresh();
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
    this.polling = false;
  }

  #total() {
    const total = { calls: 0, batches: 0, sizes: new Map(), workers: this.workers.size };
    for (const worker of this.workers.values()) {
      total.calls += worker.calls_total;
      total.batches += worker.batches_total;
      for (const [size, count] of Object.entries(worker.batch_sizes)) {
        total.sizes.set(Number(size), (total.sizes.get(Number(size)) ?? 0) + count);
      }
    }
    return total;
  }
}

function show({ calls, batches, sizes, workers }) {
  let batched = 0;
  for (const [size, count] of sizes) batched += size * count;
  find("calls").textContent = calls.toLocaleString("en");
  find("batches").textContent = batches.toLocaleString("en");
  find("mean").textContent = batches ? (batched / batches).toFixed(1) : "–";
  find("worker").textContent =
    workers > 1
      ? `Sum of the ${workers} worker processes seen by this page; each batches alone.`
      : "Since the worker process started.";
  showSizes(sizes);
}

// The height of a column is the number of calls, not of batches: it shows what share of
// the callers travelled together.
function showSizes(sizes) {
  const columns = Math.max(FEWEST_COLUMNS, ...sizes.keys());
  const calls = Array.from({ length: columns }, (_, i) => (i + 1) * (sizes.get(i + 1) ?? 0));
  const most = Math.max(1, ...calls);
  find("sizes").replaceChildren(
    ...calls.map((count, i) => {
      const size = i + 1;
      return makeColumn(size, count, count / most, isLabelled(size, columns) ? size : "");
    }),
  );
}

function isLabelled(size, columns) {
  if (columns <= MOST_LABELS || size === 1 || size === columns) return true;
  return size % 8 === 0 && columns - size > 2;
}

function makeColumn(size, calls, height, label) {
  const column = document.createElement("li");
  column.innerHTML = `<div class="bar"></div><span aria-hidden="true">${label}</span>`;
  column.firstChild.style.height = `${height * 100}%`;
  column.title = `${calls} calls in batches of ${size}`;
  return column;
}
