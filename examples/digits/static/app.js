// Wires the page together: paper, answer, live figures, bursts, trouble.

import { Answer } from "./answer.js";
import { burst } from "./burst.js";
import { Live } from "./live.js";
import { Paper } from "./paper.js";
import { drawingOf } from "./samples.js";

const find = (id) => document.getElementById(id);

const answer = new Answer();
const live = new Live(tell);
const paper = new Paper(find("paper"), (strokes, finished) => {
  find("paper-hint").hidden = strokes.length > 0;
  answer.update(strokes, finished);
});

let example = 3;
find("clear").addEventListener("click", () => paper.show([]));
find("example").addEventListener("click", () => {
  paper.show(drawingOf(example));
  example = (example + 7) % 10;
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape") paper.show([]);
  if (/^[0-9]$/.test(event.key)) paper.show(drawingOf(Number(event.key)));
});

const runs = [...document.querySelectorAll(".run")];
const seconds = new Map();
for (const run of runs) run.querySelector("button").addEventListener("click", () => start(run));

async function start(run) {
  const { path } = run.dataset;
  const fill = run.querySelector(".fill");
  const result = run.querySelector(".result");
  for (const each of runs) each.querySelector("button").disabled = true;
  result.textContent = "Running …";
  const before = await live.refresh();
  const done = await burst(path, (share) => {
    fill.style.transform = `scaleX(${share})`;
  });
  const after = await live.refresh();
  for (const each of runs) each.querySelector("button").disabled = false;
  run.querySelector("button").focus({ preventScroll: true });

  result.textContent = describe(done, before, after);
  run.classList.toggle("failed", done.error !== null);
  if (done.error) seconds.delete(path);
  else seconds.set(path, done.seconds);
  compare();
}

function describe({ seconds, count, right, failed, error }, before, after) {
  if (error) return `${failed} of ${count} failed. ${error.message}`;
  const batches = before && after && after.workers === 1 ? after.batches - before.batches : 0;
  const calls = batches ? ` ${batches} calls of the model.` : "";
  return `${seconds.toFixed(2)} s, ${right} of ${count} right.${calls}`;
}

function compare() {
  if (seconds.size < 2) {
    find("compared").textContent = "";
    return;
  }
  const ratio = seconds.get("predict_single") / seconds.get("predict");
  find("compared").textContent =
    ratio >= 1
      ? `Batched was ${ratio.toFixed(1)} times as fast.`
      : `One by one was ${(1 / ratio).toFixed(1)} times as fast.`;
}

function tell(error) {
  const trouble = find("trouble");
  trouble.hidden = error === null;
  if (error) trouble.textContent = `${error.message} Trying again …`;
}
