// Sends many digits at once, and says how long all the answers took.

import { toPixels } from "./preprocess.js";
import { drawingOf } from "./samples.js";
import { predict } from "./server.js";

const COUNT = 200;

/**
 * @param {string} path where to post
 * @param {(share: number) => void} onProgress called with the share answered, 0 to 1
 * @returns {Promise<{seconds: number, count: number, right: number, failed: number,
 *   error: ?Error}>} error is the last failure's
 */
export async function burst(path, onProgress) {
  const pictures = Array.from({ length: 10 }, (_, digit) => toPixels(drawingOf(digit)));
  let [right, wrong, failed, error] = [0, 0, 0, null];

  async function one(digit) {
    try {
      const answer = await predict(path, pictures[digit]);
      if (answer.digit === digit) right += 1;
      else wrong += 1;
    } catch (problem) {
      failed += 1;
      error = problem;
    }
    onProgress((right + wrong + failed) / COUNT);
  }

  const start = performance.now();
  await Promise.all(Array.from({ length: COUNT }, (_, i) => one(i % 10)));
  const seconds = (performance.now() - start) / 1000;
  return { seconds, count: COUNT, right, failed, error };
}
