// One drawing of each digit, as pen strokes in a box of 100 by 100.

const MARGIN = 0.13; // of the paper, on each side

const DRAWINGS = [
  ["50,5 33,14 25,34 25,64 33,86 50,95 66,86 75,64 75,34 66,14 52,5"],
  ["34,28 54,6 54,95"],
  ["24,28 30,12 46,5 63,9 72,24 66,42 48,62 22,94 78,94"],
  ["27,14 45,5 64,10 70,26 61,42 44,48 64,54 75,71 66,89 46,95 25,86"],
  ["50,5 18,62 82,62", "62,36 60,95"],
  ["74,6 32,6 28,44 48,39 67,47 75,65 67,85 48,95 26,88"],
  ["62,5 42,24 28,52 26,74 36,91 54,95 70,86 74,70 64,57 46,55 29,66"],
  ["22,7 78,7 60,45 46,95"],
  ["68,15 50,5 33,15 34,33 50,47 67,62 70,82 52,95 33,84 33,64 50,48 66,32 67,15"],
  ["71,30 62,45 44,48 29,38 28,20 41,7 58,6 71,20 72,42 66,70 52,95"],
];

/**
 * @param {number} digit
 * @returns {Array<Array<{x: number, y: number}>>} strokes, from 0 to 1 in both directions
 */
export function drawingOf(digit) {
  return DRAWINGS[digit].map((stroke) =>
    rounded(
      stroke.split(" ").map((point) => {
        const [x, y] = point.split(",").map(Number);
        return { x: onPaper(x), y: onPaper(y) };
      }),
    ),
  );
}

function onPaper(place) {
  return MARGIN + (place / 100) * (1 - 2 * MARGIN);
}

// Halve the corners twice, as a hand does.
function rounded(points) {
  let line = points;
  for (let i = 0; i < 2; i++) {
    const inner = line.slice(1).flatMap((b, j) => {
      const a = line[j];
      return [between(a, b, 0.25), between(a, b, 0.75)];
    });
    line = [line[0], ...inner, line.at(-1)];
  }
  return line;
}

function between(a, b, t) {
  return { x: a.x + (b.x - a.x) * t, y: a.y + (b.y - a.y) * t };
}
