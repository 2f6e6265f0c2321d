// Asks the server about the drawing and shows the digit, the bars and the 8x8 picture.

import { toPixels } from "./preprocess.js";
import { predict } from "./server.js";

const PAUSE = 150; // milliseconds between questions while one draws
const SURE = 0.5;
const find = (id) => document.getElementById(id);

export class Answer {
  constructor() {
    this.bars = Array.from({ length: 10 }, (_, digit) => makeBar(digit));
    find("bars").replaceChildren(...this.bars);
    this.asking = false;
    this.update([], true);
  }

  /** Take what is drawn now. One question is under way at a time; the newest wins. */
  async update(strokes, finished) {
    this.wanted = { strokes, finished };
    if (this.asking) return;
    this.asking = true;
    while (this.wanted) {
      const { strokes: now, finished: last } = this.wanted;
      this.wanted = null;
      await this.#answer(now, last);
    }
    this.asking = false;
  }

  async #answer(strokes, finished) {
    const pixels = strokes.length ? toPixels(strokes) : new Array(64).fill(0);
    showPixels(pixels);
    if (!strokes.length) return this.#clear("Nothing drawn yet");
    try {
      this.#show(await predict("predict", pixels), finished);
    } catch (error) {
      this.#clear(error.message);
    }
    if (!finished) await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }

  #show({ digit, probabilities }, finished) {
    find("digit").textContent = digit;
    this.bars.forEach((bar, i) => fillBar(bar, probabilities[i], i === digit));
    if (!finished) return say("Drawing …"); // spoken aloud, so not each guess
    const share = percent(probabilities[digit]);
    const sure = probabilities[digit] >= SURE;
    say(`${sure ? "It is" : "Perhaps"} a ${digit}, ${share}`);
  }

  #clear(verdict) {
    find("digit").textContent = "–";
    say(verdict);
    this.bars.forEach((bar) => fillBar(bar, 0, false));
  }
}

function say(verdict) {
  const place = find("verdict");
  if (place.textContent !== verdict) place.textContent = verdict;
}

function makeBar(digit) {
  const bar = document.createElement("li");
  bar.innerHTML = `<b>${digit}</b><div class="track"><div class="fill"></div></div><span></span>`;
  return bar;
}

function fillBar(bar, share, best) {
  bar.classList.toggle("best", best);
  bar.querySelector(".fill").style.transform = `scaleX(${share})`;
  bar.querySelector("span").textContent = percent(share);
}

function percent(share) {
  return `${Math.round(share * 100)}\u00a0%`;
}

function showPixels(pixels) {
  const canvas = find("seen");
  const pen = canvas.getContext("2d");
  const picture = pen.createImageData(8, 8);
  pixels.forEach((value, i) => {
    picture.data[i * 4 + 3] = (value / 16) * 255; // black; style.css inverts it in the dark
  });
  pen.putImageData(picture, 0, 0);
}
