// A mass on a spring, its state as one complex number, and its output (ch. "State
// spaces"): push it when you like, with the button or on the mass itself.

import { animate, axes, button, canvas, colours, row, slider, still } from "./shared.js";

const SECONDS = 4; // of the output that are seen

export function spring(stage, { omega, gamma }) {
  let state = [1, 0]; // z, real and imaginary part
  let time = 0;
  let trace = []; // [time, z] of the last seconds
  let pushes = [0]; // times
  let mass; // where it is drawn

  const swing = () => Math.sqrt(Math.max(omega ** 2 - gamma ** 2, 1e-6));
  const position = ([, imaginary]) => imaginary / swing();
  const scale = () => omega / 2; // an undamped push from rest swings to 1/2

  /** Let time pass: z turns and shrinks, by exp(lambda dt). */
  const pass = (seconds) => {
    const shrink = Math.exp(-gamma * seconds);
    const [c, s] = [Math.cos(swing() * seconds), Math.sin(swing() * seconds)];
    const [a, b] = state;
    state = [shrink * (a * c - b * s), shrink * (a * s + b * c)];
    time += seconds;
    trace.push([time, state]);
    trace = trace.filter(([then]) => then > time - SECONDS);
    pushes = pushes.filter((then) => then > time - SECONDS);
  };
  const push = () => {
    state = [state[0] + 1, state[1]];
    pushes.push(time);
    if (still()) for (let k = 0; k < 200; k++) pass(SECONDS / 200);
    view.redraw();
  };

  /** Once pushed, some time ago. */
  const begin = () => {
    [state, time, trace, pushes] = [[1, 0], 0, [], [0]];
    for (let k = 0; k < 60; k++) pass(SECONDS / 200);
  };
  /** Where nothing moves, what another spring would do has to be asked anew. */
  const change = (what) => {
    what();
    if (still()) begin();
    view.redraw();
  };

  const draw = (pen, width, height) => {
    const hue = colours();
    const stacked = width < 560;
    const side = stacked ? Math.min(width * 0.5, width - 150, 190) : height - 70;
    const since = time - (pushes.at(-1) ?? -9);
    mass = drawMass(pen, {
      left: stacked ? Math.max(8, width / 2 - side / 2 - 110) : 8, top: 24, height: side,
      here: position(state) * scale(), pushed: since < 0.25 && !still(), hue,
    });
    const left = stacked ? mass.right + 52 : 150;
    const seen = trace.map(([, z]) => position(z) * scale());
    const within = (least, values) => Math.max(least, Math.ceil(Math.max(...values.map(Math.abs))));
    const far = within(2, trace.map(([, z]) => Math.hypot(...z))); // after many pushes
    const high = within(1, seen);
    const plane = axes(pen, {
      left, top: 24, width: side, height: side,
      x: [-far, far], y: [-far, far], labels: ["Re z", "Im z"], title: "state z",
    });
    plane.line([-far, far], [0, 0], hue.line, 1);
    plane.line([0, 0], [-far, far], hue.line, 1);
    const tail = trace.filter(([then]) => then > time - 0.5).map(([, z]) => z);
    plane.line(tail.map((z) => z[0]), tail.map((z) => z[1]), hue.sky, 2);
    plane.dot(...state, hue.blue, 6);
    const start = stacked ? 46 : left + side + 60;
    const output = axes(pen, {
      left: start, top: stacked ? side + 90 : 24, width: width - start - 16,
      height: stacked ? height - side - 130 : side,
      x: [-SECONDS, 0], y: [-high, high], labels: ["seconds before now", "y"],
      title: "output y, pushes in orange",
    });
    output.line([-SECONDS, 0], [0, 0], hue.line, 1);
    for (const then of pushes) {
      output.line([then - time, then - time], [-high, -0.7 * high], hue.orange, 4);
    }
    output.line(trace.map(([then]) => then - time), seen, hue.blue, 2);
  };
  const view = canvas(stage, {
    label: "A mass on a spring, its complex state and its output; the button pushes it.",
    height: (width) => (width < 560 ? 440 : 280),
    draw,
  });
  const controls = row(stage);
  const pusher = button(controls, { label: "Push", press: push });
  slider(controls, {
    label: "damping γ", min: 0.05, max: 3, step: 0.05, value: gamma,
    format: (value) => `${value.toFixed(2)} / s`,
    change: (value) => change(() => { gamma = value; }),
  });
  slider(controls, {
    label: "frequency ω / 2π", min: 3.2, max: 12.6, step: 0.1, value: omega,
    format: (value) => `${(value / (2 * Math.PI)).toFixed(2)} Hz`,
    change: (value) => change(() => { omega = value; }),
  });
  const over = (event) => event.offsetX < mass.right && event.offsetY < mass.bottom;
  view.element.addEventListener("pointermove", (event) => {
    view.element.style.cursor = over(event) ? "pointer" : "";
  });
  view.element.addEventListener("click", (event) => {
    if (!over(event)) return;
    pusher.focus({ preventScroll: true }); // the space bar goes on pushing
    push();
  });
  begin();
  if (!still()) animate(view.element, (seconds) => { pass(seconds); view.redraw(); });
}

/** The spring, its mass, and an arrow below it while it is pushed; returns its corner. */
function drawMass(pen, { left, top, height, here, pushed, hue }) {
  const middle = left + 40;
  const edge = top + height * (0.5 - 0.22 * Math.min(1.6, Math.max(-1.6, here)));
  pen.strokeStyle = hue.muted;
  pen.beginPath();
  for (let k = 0; k <= 60; k++) {
    pen.lineTo(middle + 9 * Math.sin((14 * Math.PI * k) / 60), top + ((edge - top) * k) / 60);
  }
  pen.stroke();
  pen.beginPath();
  pen.moveTo(middle - 24, top);
  pen.lineTo(middle + 24, top);
  pen.stroke();
  pen.fillStyle = hue.blue;
  pen.fillRect(middle - 19, edge, 38, 38);
  if (pushed) {
    pen.fillStyle = hue.orange;
    pen.beginPath();
    pen.moveTo(middle, edge + 42);
    pen.lineTo(middle - 11, edge + 58);
    pen.lineTo(middle + 11, edge + 58);
    pen.fill();
  }
  pen.fillStyle = hue.muted;
  pen.textAlign = "center";
  pen.fillText("tap to push", middle, top + height + 30);
  return { right: left + 80, bottom: top + height + 36 };
}
