// An eigenvalue to drag in its plane: what a step makes of it ("How good is a step?"),
// and its kernel, also folded into an image read row by row ("The convolution").

import { axes, canvas, choice, colours, drag, panels, row, say, slider } from "./shared.js";
import { discretize, kernel } from "./state_space.js";

const REAL = [-3, 0.5];
const IMAG = [0, 100];
const LAGS = 96; // of the kernel that are drawn one by one
const ROUNDING = 1e-12; // what is nearer to 1 than this is 1
const RULES = [["ZOH", "zero-order hold"], ["bilinear", "bilinear rule"]];

/** `longest`: the largest step. With `n` S4D-Lin is shown too, with `width` the fold. */
export function eigenvalue(stage, { real, imag, dt, longest, rule, n, width }) {
  const states = () => Array.from({ length: (n ?? 0) / 2 }, (_, k) => [-0.5, Math.PI * k]);
  const step = (A = [real, imag]) => discretize(rule, A, dt);
  const views = [];
  const change = () => {
    for (const view of views) view.redraw();
    const [dA] = step();
    const size = Math.hypot(...dA);
    const growth = Math.log(size);
    const text = growth < 0 ? "half is forgotten" : "it doubles";
    const steps = Math.abs(Math.log(2) / growth);
    const when = Math.abs(growth) > ROUNDING ? `${text} after ${digits(steps)} steps` : "it stays";
    told(`Ā = ${digits(dA[0])} ${dA[1] < 0 ? "−" : "+"} ${digits(Math.abs(dA[1]))} i, ` +
      `|Ā| = ${size.toFixed(3)}: ${when}`);
  };

  const top = panels(stage);
  let plane;
  views.push(canvas(top, {
    label: "The plane of the eigenvalue A, its left half shaded: drag the point.",
    height: () => 250,
    draw: (pen, wide, tall) => {
      const hue = colours();
      plane = axes(pen, {
        left: 46, top: 24, width: wide - 58, height: tall - 64, x: REAL, y: IMAG,
        labels: ["Re A", "Im A"], title: "eigenvalue A",
      });
      plane.area(REAL[0], IMAG[0], 0, IMAG[1], hue.sky);
      const edge = Math.PI / dt;
      if (edge < IMAG[1]) plane.line(REAL, [edge, edge], hue.muted, 1.2, [3, 3]);
      for (const A of states()) plane.dot(...A, hue.orange, 3);
      plane.dot(real, imag, hue.blue, 8);
    },
  }));
  views.push(canvas(top, {
    label: "The unit disc with the eigenvalue after a step.",
    height: () => 250,
    draw: (pen, wide, tall) => {
      const hue = colours();
      const side = Math.min(wide - 58, tall - 64);
      const [[a, b]] = step();
      const far = Math.max(1.2, Math.ceil(11 * Math.hypot(a, b)) / 10); // if it is outside
      const disc = axes(pen, {
        left: 46 + (wide - 58 - side) / 2, top: 24, width: side, height: side,
        x: [-far, far], y: [-far, far], labels: ["Re Ā", "Im Ā"],
        title: "after a step: Ā",
      });
      drawDisc(pen, disc, hue);
      for (const A of states()) disc.dot(...step(A)[0], hue.orange, 3);
      if (imag > 0) disc.dot(a, -b, hue.muted, 3);
      disc.dot(a, b, hue.blue, 8);
    },
  }));
  drag(views[0].element, (x, y) => {
    const [a, b] = plane.of(x, y);
    real = Math.min(REAL[1], Math.max(REAL[0], a));
    imag = Math.min(IMAG[1], Math.max(IMAG[0], b));
    sliders.real.set(real);
    sliders.imag.set(imag);
    change();
  });

  const bottom = panels(stage);
  views.push(canvas(bottom, {
    label: "The kernel: the answer to one kick, position by position.",
    height: () => 250,
    draw: (pen, wide, tall) => {
      const hue = colours();
      const K = scaled(kernel(...step(), LAGS));
      const lags = [...K.keys()];
      const curve = axes(pen, {
        left: 46, top: 24, width: wide - 58, height: tall - 64, x: [0, LAGS], y: [-1, 1],
        labels: ["lag (positions)", ""], title: "kernel, scaled",
      });
      curve.line([0, LAGS], [0, 0], hue.line, 1);
      curve.line(lags, K, hue.blue, 1);
      for (const l of lags) curve.dot(l, K[l], hue.blue, 2);
    },
  }));
  if (width) {
    views.push(canvas(bottom, {
      label: "The kernel folded into an image, row by row.",
      height: () => 250,
      draw: (pen, wide, tall) => drawFold(pen, wide, tall, scaled(kernel(...step(), width ** 2)), width),
    }));
  }

  const told = say(stage);
  const controls = row(stage);
  const sliders = {
    real: slider(controls, {
      label: "real part", min: REAL[0], max: REAL[1], step: 0.01, value: real,
      format: (value) => digits(value), change: (value) => { real = value; change(); },
    }),
    imag: slider(controls, {
      label: "imaginary part", min: IMAG[0], max: IMAG[1], step: 0.1, value: imag,
      format: (value) => digits(value), change: (value) => { imag = value; change(); },
    }),
  };
  slider(controls, {
    label: "step Δ", min: -3, max: Math.log10(longest), step: 0.01, value: Math.log10(dt),
    format: (value) => digits(10 ** value, 2), change: (value) => { dt = 10 ** value; change(); },
  });
  if (n) {
    slider(controls, {
      label: "states N", min: 2, max: 64, step: 2, value: n,
      change: (value) => { n = value; change(); },
    });
  }
  if (width) {
    slider(controls, {
      label: "width W", min: 8, max: 64, step: 1, value: width,
      format: (value) => `${value} pixels`, change: (value) => { width = value; change(); },
    });
  }
  choice(controls, {
    label: "rule", options: RULES, value: rule,
    change: (value) => { rule = value; change(); },
  });
  change();
}

function drawDisc(pen, disc, hue) {
  const [[left, middle], [right]] = [disc.at(-1, 0), disc.at(1, 0)];
  pen.beginPath();
  pen.arc((left + right) / 2, middle, (right - left) / 2, 0, 2 * Math.PI);
  pen.strokeStyle = hue.muted;
  pen.stroke();
  pen.fillStyle = hue.sky;
  pen.globalAlpha = 0.15;
  pen.fill();
  pen.globalAlpha = 1;
}

function digits(value, count = 3) {
  return Number(value.toPrecision(count)).toString().replace("-", "−");
}

function scaled(K) {
  const largest = K.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-300);
  return K.map((value) => value / largest);
}

/** K as an image: blue where it is positive, orange where it is negative. */
function drawFold(pen, wide, tall, K, width) {
  const hue = colours();
  const cell = Math.max(1, Math.floor((Math.min(wide - 20, tall - 44)) / width));
  const [left, top] = [(wide - cell * width) / 2, 24];
  pen.fillStyle = hue.text;
  pen.textAlign = "center";
  pen.fillText("folded, row by row", wide / 2, 14);
  for (let l = 0; l < K.length; l++) {
    pen.fillStyle = K[l] > 0 ? hue.blue : hue.orange;
    pen.globalAlpha = Math.abs(K[l]);
    pen.fillRect(left + cell * (l % width), top + cell * Math.floor(l / width), cell, cell);
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = hue.line;
  pen.strokeRect(left, top, cell * width, cell * width);
}
