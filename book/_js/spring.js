// A mass on a spring, its state as one complex number, and its output (ch. "State
// spaces"): push it when you like.

import { animate, axes, button, canvas, colours, drag, row, slider, still } from "./shared.js";

const SECONDS = 4; // of the output that are seen

export function spring(stage, { omega, gamma }) {
  let state = [1, 0]; // z, real and imaginary part
  let time = 0;
  let trace = []; // [time, z] of the last seconds
  let pushes = []; // times

  const swing = () => Math.sqrt(Math.max(omega ** 2 - gamma ** 2, 1e-6));
  const position = ([, imaginary]) => imaginary / swing();

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

  const draw = (pen, width, height) => {
    const hue = colours();
    const stacked = width < 560;
    const side = stacked ? Math.min(width * 0.5, 190) : height - 60;
    drawMass(pen, { left: 12, top: 10, height: side, position: position(state), hue, omega });
    const plane = axes(pen, {
      left: stacked ? width - side - 8 : 130, top: 10, width: side, height: side,
      x: [-2, 2], y: [-2, 2], labels: ["Re z", "Im z"],
    });
    const tail = trace.filter(([then]) => then > time - 0.5).map(([, z]) => z);
    plane.line(tail.map((z) => z[0]), tail.map((z) => z[1]), hue.sky, 2);
    plane.dot(...state, hue.blue, 6);
    const left = stacked ? 46 : 130 + side + 60;
    const output = axes(pen, {
      left, top: stacked ? side + 60 : 10, width: width - left - 16,
      height: stacked ? height - side - 100 : side,
      x: [-SECONDS, 0], y: [-1, 1], labels: ["seconds before now", "output y"],
    });
    for (const then of pushes) {
      output.line([then - time, then - time], [-1, -0.7], hue.orange, 4);
    }
    const scale = omega / 2; // a push from rest swings by about a half
    output.line(trace.map(([then]) => then - time), trace.map(([, z]) => position(z) * scale), hue.blue, 2);
  };
  const view = canvas(stage, {
    label: "A mass on a spring, its complex state and its output; the button pushes it.",
    height: (width) => (width < 560 ? 420 : 260),
    draw,
  });
  const controls = row(stage);
  button(controls, { label: "Push", press: push });
  slider(controls, {
    label: "damping γ", min: 0.05, max: 3, step: 0.05, value: gamma,
    format: (value) => `${value.toFixed(2)} per second`,
    change: (value) => { gamma = value; view.redraw(); },
  });
  slider(controls, {
    label: "frequency ω", min: 3.2, max: 12.6, step: 0.1, value: omega,
    format: (value) => `${(value / (2 * Math.PI)).toFixed(2)} turns per second`,
    change: (value) => { omega = value; view.redraw(); },
  });
  drag(view.element, () => {}, push);
  for (let k = 0; k < 200; k++) pass(SECONDS / 200);
  if (!still()) animate(view.element, (seconds) => { pass(seconds); view.redraw(); });
}

function drawMass(pen, { left, top, height, position, hue, omega }) {
  const middle = left + 35;
  const here = top + height * (0.55 - 0.25 * position * omega / 2);
  pen.strokeStyle = hue.muted;
  pen.beginPath();
  for (let k = 0; k <= 60; k++) {
    pen.lineTo(middle + 9 * Math.sin((14 * Math.PI * k) / 60), top + ((here - top) * k) / 60);
  }
  pen.stroke();
  pen.fillStyle = hue.blue;
  pen.fillRect(middle - 16, here, 32, 32);
}
