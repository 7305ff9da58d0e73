// An input, also drawn by hand, a kernel, and their convolution, on a circle of L
// positions or with room for the tail ("The convolution").

import { axes, canvas, check, choice, colours, panels, row, say, slider } from "./shared.js";
import { sketch } from "./sketch.js";

const LENGTH = 64; // L

/** The causal sum of eq-convolution-causal with its tail: 2L numbers. */
export function convolve(u, K) {
  const y = new Float64Array(2 * u.length);
  for (let i = 0; i < u.length; i++) {
    for (let l = 0; l < K.length; l++) y[i + l] += K[l] * u[i];
  }
  return y;
}

/** The tail folded onto the start: eq-convolution-wrap. */
export function wrapped(y) {
  const L = y.length / 2;
  return y.slice(0, L).map((value, k) => value + y[k + L]);
}

export function convolution(stage, { kind, place, turns, decay, frequency, padded }) {
  const positions = Array.from({ length: LENGTH }, (_, k) => k);
  const inputs = {
    kick: (k) => (k === place ? 1 : 0),
    box: (k) => (k >= place && k < place + 8 ? 1 : 0),
    wave: (k) => Math.cos((2 * Math.PI * turns * (k - place)) / LENGTH),
  };
  let u = positions.map(inputs[kind]);
  const kernel = () => positions.map((l) => Math.exp(-decay * l) * Math.cos(frequency * l));

  const top = panels(stage);
  let paper;
  const views = [];
  const frame = (pen, width, height, options) =>
    axes(pen, { left: 46, top: 24, width: width - 58, height: height - 64, ...options });
  const bars = (drawn, values, colour) => {
    values.forEach((value, k) => drawn.line([k + 0.5, k + 0.5], [0, value], colour, 2));
    drawn.line([0, LENGTH], [0, 0], colours().line, 1);
  };
  views.push(canvas(top, {
    label: "The input: draw on it.",
    height: () => 200,
    draw: (pen, width, height) => {
      paper = frame(pen, width, height, {
        x: [0, LENGTH], y: [-1, 1], labels: ["position", ""], title: "input u: draw here",
      });
      bars(paper, u, colours().green);
    },
  }));
  views.push(canvas(top, {
    label: "The kernel.",
    height: () => 200,
    draw: (pen, width, height) => {
      const drawn = frame(pen, width, height, {
        x: [0, LENGTH], y: [-1, 1], labels: ["lag", ""], title: "kernel K",
      });
      bars(drawn, kernel(), colours().muted);
    },
  }));
  views.push(canvas(stage, {
    label: "The output, with what is cut off or comes back at the start.",
    height: () => 230,
    draw: (pen, width, height) => {
      const hue = colours();
      const y = convolve(u, kernel());
      const circle = wrapped(y);
      const most = Math.max(1, ...[...y, ...circle].map(Math.abs));
      const size = Number(most.toPrecision(2));
      const drawn = frame(pen, width, height, {
        x: [0, 2 * LENGTH], y: [-size, size], labels: ["position", ""],
        title: padded ? "output y: the tail is cut off" : "output y: the tail comes back (orange)",
      });
      drawn.area(LENGTH, -size, 2 * LENGTH, size, hue.muted);
      drawn.line([0, 2 * LENGTH], [0, 0], hue.line, 1);
      const middles = (list) => [...list.keys()].map((k) => k + 0.5);
      drawn.line(middles(y), y, padded ? hue.blue : hue.muted, 2, padded ? [] : [2, 4]);
      if (!padded) drawn.line(middles(circle), circle, hue.orange, 2.4);
    },
  }));
  const told = say(stage);
  const change = () => {
    for (const view of views) view.redraw();
    const tail = convolve(u, kernel()).slice(LENGTH).map(Math.abs);
    const most = tail.reduce((a, b) => Math.max(a, b), 0).toFixed(2);
    told(padded ? `With room for 2L positions; up to ${most} is cut off at the end.`
      : `On a circle of L positions; up to ${most} of the end is added to the start.`);
  };

  const controls = row(stage);
  const list = choice(controls, {
    label: "input", value: kind,
    options: [["kick", "a kick"], ["box", "a box"], ["wave", "a wave"], ["drawn", "drawn by hand"]],
    change: (value) => { if (value === "drawn") invite(); begin(value); },
  });
  const begin = (value) => {
    kind = value;
    if (kind !== "drawn") u = positions.map(inputs[kind]);
    change();
  };
  check(controls, {
    label: "padded to 2L", value: padded, change: (value) => { padded = value; change(); },
  });
  slider(controls, {
    label: "place", min: 0, max: LENGTH - 1, step: 1, value: place,
    change: (value) => {
      place = value;
      if (kind === "drawn") list.value = "kick"; // a drawing has no place
      begin(list.value);
    },
  });
  slider(controls, {
    label: "turns of the wave", min: 0, max: 16, step: 1, value: turns,
    change: (value) => { turns = value; begin(list.value = "wave"); },
  });
  slider(controls, {
    label: "kernel: decay", min: 0, max: 0.3, step: 0.01, value: decay,
    format: (value) => value.toFixed(2), change: (value) => { decay = value; change(); },
  });
  slider(controls, {
    label: "kernel: frequency", min: 0, max: 3.1, step: 0.05, value: frequency,
    format: (value) => value.toFixed(2), change: (value) => { frequency = value; change(); },
  });
  const invite = sketch(views[0], {
    values: () => u,
    of: (x, y) => {
      const [k, value] = paper.of(x, y);
      return [k, Math.min(1, Math.max(-1, value))];
    },
    change: () => { kind = list.value = "drawn"; change(); },
    tell: say(stage),
  });
  change();
}
