// A signal, also drawn by hand, and what a state of N numbers knows of it, with and
// without the 1/t ("What a state remembers").

import { axes, canvas, choice, colours, row, say, slider } from "./shared.js";
import { sketch } from "./sketch.js";

const UNIT = 100; // samples in a unit of time of the time-invariant system
const RANGE = [-1.3, 1.9];

/** The Legendre polynomials P_0 ... P_n at x, as a list. */
function legendre(n, x) {
  const P = [1, x];
  for (let k = 1; k < n; k++) P.push(((2 * k + 1) * x * P[k] - k * P[k - 1]) / (k + 1));
  return P;
}

/** The sum of x_n p_n(s), orthonormal on [0, 1]: eq-state-space-legs-state. */
export function recall(x, s) {
  const P = legendre(x.length, 2 * s - 1);
  return x.reduce((sum, value, n) => sum + value * Math.sqrt(2 * n + 1) * P[n], 0);
}

/** The state after one pass over u with the 1/t: bilinear steps of eq-state-space-legs. */
export function stretched(u, N) {
  const root = Array.from({ length: N }, (_, n) => Math.sqrt(2 * n + 1));
  const x = new Float64Array(N);
  for (let k = 0; k < u.length; k++) {
    const h = 1 / (2 * k + 1);
    let before = 0; // sum of root_j x_j over j < n: A is triangular
    let after = 0;
    for (let n = 0; n < N; n++) {
      const old = x[n];
      const moved = old - h * (root[n] * before + (n + 1) * old) + 2 * h * u[k] * root[n];
      x[n] = (moved - h * root[n] * after) / (1 + h * (n + 1));
      before += root[n] * old;
      after += root[n] * x[n];
    }
  }
  return x;
}

/** The state without the 1/t, eq-state-space-lti, for an input that holds. */
export function fading(u, N) {
  const x = new Float64Array(N);
  let late = integrals(1, N);
  for (let j = 0; j < u.length; j++) {
    const early = integrals(Math.exp(-(j + 1) / UNIT), N);
    for (let n = 0; n < N; n++) x[n] += u[u.length - 1 - j] * (late[n] - early[n]);
    late = early;
  }
  return x;
}

/** The integral of p_n from 0 to s: (P_{n+1} - P_{n-1}) / (2 sqrt(2n + 1)). */
function integrals(s, N) {
  const P = legendre(N + 1, 2 * s - 1);
  return P.slice(0, N).map((_, n) =>
    n ? (P[n + 1] - P[n - 1]) / (2 * Math.sqrt(2 * n + 1)) : s);
}

export function memory(stage, { signal, kind, place, turns, n, now }) {
  const L = signal.length;
  let u;
  const begin = () => {
    u = signal.slice();
    for (let k = 0; k < L && kind !== "noise"; k++) {
      const t = k / L;
      u[k] = kind === "pulse" ? Math.exp(-(((t - place) / 0.03) ** 2))
        : Math.sin(2 * Math.PI * turns * t);
    }
  };
  let top;
  const panel = (title, state, clock) => (pen, width, height) => {
    const hue = colours();
    const frame = axes(pen, {
      left: 46, top: 24, width: width - 66, height: height - 64, x: [0, L], y: RANGE,
      labels: ["sample", "signal"], title,
    });
    const past = [...u.keys()].slice(0, now);
    frame.line([...u.keys()], u, hue.line, 2);
    frame.line(past, u.slice(0, now), hue.muted, 2);
    const x = state(u.slice(0, now), n);
    frame.line(past, past.map((k) => recall(x, clock(k))), hue.blue, 2);
    frame.line([now, now], RANGE, hue.orange, 1.6);
    return frame;
  };
  const evenly = panel("with 1/t: all, evenly (draw here)", stretched, (k) => (k + 0.5) / now);
  const sharply = panel("without: the recent past, sharply", fading,
    (k) => Math.exp(-(now - 0.5 - k) / UNIT));
  const views = [
    canvas(stage, {
      label: "A signal to draw on, and what the state with 1/t knows of it.",
      height: () => 220,
      draw: (...given) => { top = evenly(...given); },
    }),
    canvas(stage, {
      label: "The same signal, and what the time-invariant state knows of it.",
      height: () => 220,
      draw: sharply,
    }),
  ];
  const change = () => views.forEach((view) => view.redraw());
  const chosen = (pick) => (value) => { pick(value); begin(); change(); };

  const controls = row(stage);
  const list = choice(controls, {
    label: "signal", value: kind,
    options: [["noise", "smooth noise"], ["pulse", "a pulse"], ["wave", "a wave"], ["drawn", "drawn by hand"]],
    change: (value) => {
      if (value === "drawn") invite();
      else chosen((to) => { kind = to; })(value);
    },
  });
  slider(controls, {
    label: "pulse at sample", min: 0, max: 1, step: 0.01, value: place,
    format: (value) => String(Math.round(value * L)),
    change: chosen((value) => { place = value; kind = list.value = "pulse"; }),
  });
  slider(controls, {
    label: "turns of the wave", min: 1, max: 40, step: 1, value: turns,
    change: chosen((value) => { turns = value; kind = list.value = "wave"; }),
  });
  slider(controls, {
    label: "numbers N", min: 1, max: 64, step: 1, value: n,
    change: (value) => { n = value; change(); },
  });
  slider(controls, {
    label: "seen", min: 10, max: L, step: 10, value: now,
    format: (value) => `${value} samples`, change: (value) => { now = value; change(); },
  });
  const invite = sketch(views[0], {
    values: () => u,
    of: (x, y) => {
      const [k, value] = top.of(x, y);
      return [k, Math.min(RANGE[1], Math.max(RANGE[0], value))];
    },
    change: () => { list.value = "drawn"; change(); },
    tell: say(stage),
  });
  begin();
}
