// The drawing area: collects pen strokes and shows them, sharp on any screen.

const PEN_WIDTH = 0.065; // of the paper's side

export class Paper {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {(strokes: Array, finished: boolean) => void} onChange called as one draws
   */
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.strokes = [];
    this.pointer = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.#up(event));
    // No gesture may begin here: after a quick stroke it would swallow the next tap.
    canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    new ResizeObserver(() => this.#paint()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
  }

  show(strokes) {
    this.strokes = strokes;
    this.pointer = null;
    this.#paint();
    this.onChange(strokes, true);
  }

  #down(event) {
    if (this.pointer !== null || event.button !== 0) return;
    event.preventDefault();
    this.pointer = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    this.strokes = [...this.strokes, [this.#place(event)]];
    this.#changed(false);
  }

  #move(event) {
    if (event.pointerId !== this.pointer) return;
    const seen = event.getCoalescedEvents?.() ?? [];
    const stroke = this.strokes.at(-1);
    for (const part of seen.length ? seen : [event]) stroke.push(this.#place(part));
    this.#changed(false);
  }

  #up(event) {
    if (event.pointerId !== this.pointer) return;
    this.pointer = null;
    this.#changed(true);
  }

  #changed(finished) {
    this.#paint();
    this.onChange(this.strokes, finished);
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) / box.width,
      y: (event.clientY - box.top) / box.height,
    };
  }

  #paint() {
    const { canvas } = this;
    const side = Math.round(canvas.clientWidth * devicePixelRatio);
    if (canvas.width !== side) canvas.width = canvas.height = side;
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, side, side);
    pen.strokeStyle = getComputedStyle(canvas).color;
    pen.lineWidth = PEN_WIDTH * side;
    pen.lineCap = pen.lineJoin = "round";
    for (const stroke of this.strokes) {
      pen.beginPath();
      trace(pen, stroke.map(({ x, y }) => ({ x: x * side, y: y * side })));
      pen.stroke();
    }
  }
}

// Curve from middle to middle of what the pointer reported, which is coarse.
function trace(pen, stroke) {
  const end = stroke.at(-1);
  pen.moveTo(stroke[0].x, stroke[0].y);
  for (let i = 1; i < stroke.length - 1; i++) {
    const [a, b] = [stroke[i], stroke[i + 1]];
    pen.quadraticCurveTo(a.x, a.y, (a.x + b.x) / 2, (a.y + b.y) / 2);
  }
  pen.lineTo(end.x, end.y);
}
