// Turn pen strokes into the 8x8 picture the model knows: 64 numbers from 0 to 16.
//
// scikit-learn's digits fill the full height, are narrow and at most about six columns
// wide, stand in the middle, and hold about the same amount of ink each: the pen of a 1
// is thick, the pen of an 8 thin. Drawings are brought into that shape here.

const CELLS = 8;
const SAMPLES = 8; // per cell and direction, averaged
const FULL = 16; // the value of a cell full of ink
const NARROW = 0.9; // people draw wider on a screen than on the paper of the data set
const MAX_COLUMNS = 5.8;
const INK = 19.5; // cells
const PEN = { thinnest: 1.45, thickest: 2.1 };

/**
 * @param {Array<Array<{x: number, y: number}>>} strokes lines of the pen, in any unit
 * @returns {number[]} 64 values, row by row
 */
export function toPixels(strokes) {
  const { lines, pen } = fitToGrid(strokes);
  return average(paint(lines, pen / 2));
}

function fitToGrid(strokes) {
  const points = strokes.flat();
  const left = Math.min(...points.map((p) => p.x));
  const right = Math.max(...points.map((p) => p.x));
  const top = Math.min(...points.map((p) => p.y));
  const bottom = Math.max(...points.map((p) => p.y));
  const width = right - left || 1e-6;
  const height = Math.max(bottom - top, width / 2);

  const length = totalLength(strokes) * (CELLS / height);
  const pen = Math.min(Math.max(INK / length, PEN.thinnest), PEN.thickest);
  const scaleY = (CELLS - pen) / height;
  const scaleX = Math.min(scaleY * NARROW, (MAX_COLUMNS - pen) / width);
  const centreX = (left + right) / 2;
  const centreY = (top + bottom) / 2;
  const lines = strokes.map((stroke) =>
    stroke.map(({ x, y }) => ({
      x: CELLS / 2 + (x - centreX) * scaleX,
      y: CELLS / 2 + (y - centreY) * scaleY,
    })),
  );
  return { lines, pen };
}

function totalLength(strokes) {
  let sum = 1e-6;
  for (const stroke of strokes) {
    for (let i = 1; i < stroke.length; i++) {
      sum += Math.hypot(stroke[i].x - stroke[i - 1].x, stroke[i].y - stroke[i - 1].y);
    }
  }
  return sum;
}

function paint(lines, radius) {
  const side = CELLS * SAMPLES;
  const ink = new Uint8Array(side * side);
  const clamp = (v) => Math.min(Math.max(v, 0), side - 1);
  for (const line of lines) {
    line.forEach((end, i) => {
      const start = line[Math.max(i - 1, 0)];
      const x0 = clamp(Math.floor((Math.min(start.x, end.x) - radius) * SAMPLES));
      const x1 = clamp(Math.ceil((Math.max(start.x, end.x) + radius) * SAMPLES));
      const y0 = clamp(Math.floor((Math.min(start.y, end.y) - radius) * SAMPLES));
      const y1 = clamp(Math.ceil((Math.max(start.y, end.y) + radius) * SAMPLES));
      for (let y = y0; y <= y1; y++) {
        for (let x = x0; x <= x1; x++) {
          const sample = { x: (x + 0.5) / SAMPLES, y: (y + 0.5) / SAMPLES };
          if (distance(sample, start, end) <= radius) ink[y * side + x] = 1;
        }
      }
    });
  }
  return ink;
}

function distance(p, a, b) {
  const dx = b.x - a.x;
  const dy = b.y - a.y;
  const along = ((p.x - a.x) * dx + (p.y - a.y) * dy) / (dx * dx + dy * dy || 1);
  const t = Math.min(Math.max(along, 0), 1);
  return Math.hypot(p.x - a.x - t * dx, p.y - a.y - t * dy);
}

function average(ink) {
  const side = CELLS * SAMPLES;
  const pixels = new Array(CELLS * CELLS).fill(0);
  ink.forEach((value, i) => {
    const row = Math.floor(i / side / SAMPLES);
    const column = Math.floor((i % side) / SAMPLES);
    pixels[row * CELLS + column] += (value * FULL) / (SAMPLES * SAMPLES);
  });
  return pixels;
}
