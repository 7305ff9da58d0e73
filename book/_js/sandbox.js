// Paint a distribution in the plane and watch points flow to it, with the exact score and
// with that of a small network which trains on it here (ch. "Score and flow").

import { chain, drawPoints, exactNoise, guided, levels, random, timesteps } from "./mixture.js";
import { trainer } from "./perceptron.js";
import { pen } from "./hand.js";
import { animate, axes, button, canvas, choice, colours, panels, row, say, slider, still } from "./shared.js";

const POINTS = 400;
const REACH = 2.2; // of the axes
const MOST = 80; // clusters
const STEPS = 4000; // of training
const PAUSE = 500; // steps of training between two pictures
const SECONDS = 4; // that the points take to arrive
const SLICE = 12; // milliseconds of a frame for computing
const METHODS = [["ancestral", "ancestral"], ["ddim", "DDIM"], ["heun", "Heun"]];

/** Distributions for those who do not paint: two halves of each are the two groups. */
export function presets() {
  const arc = (count, spread, place) => ({
    spread,
    blobs: Array.from({ length: count }, (_, k) => ({ ...place(k), weight: 1 })),
  });
  const moon = (k) => {
    const [group, turn] = [k % 2, (Math.PI * Math.floor(k / 2)) / 8];
    const side = group ? -1 : 1;
    return { x: 1.1 * Math.cos(turn) * side + 0.5 * (group - 0.5) * 2, y: side * (1.1 * Math.sin(turn) - 0.3), group };
  };
  const ring = (k) => ({
    x: 1.4 * Math.cos((Math.PI * k) / 10), y: 1.4 * Math.sin((Math.PI * k) / 10), group: k < 10 ? 0 : 1,
  });
  return {
    "two moons": arc(18, 0.12, moon),
    ring: arc(20, 0.12, ring),
    "two clusters": arc(2, 0.3, (k) => ({ x: k ? 1 : -1, y: k ? 0.6 : -0.6, group: k })),
  };
}

export function sandbox(stage, { method, steps, w, centres, weights, groups, spread }) {
  let data = {
    spread,
    blobs: centres.map(([x, y], k) => ({ x, y, weight: weights[k], group: groups[k] })),
  };
  let paint = 0; // the group that a click paints
  let done = still() ? 1 : 0; // share of the way
  let playing = !still();
  let pupil = null; // the network in training, which has done `trained` steps
  let ways = []; // both chains as far as they are computed; missing when they are outdated
  let paper; // the first panel as it was drawn last, for the hand
  const table = levels();
  const start = drawPoints([{ x: 0, y: 0, weight: 1 }], 1, POINTS, random(1)).points;

  const change = (what) => {
    what();
    ways = [];
    redraw();
  };
  /** Other data: the network knows nothing of them yet. */
  const renew = (next) => change(() => {
    data = next;
    pupil = null;
    tell();
  });
  /** What the mixture and the network predict: functions of x, y and level. */
  const predictions = () => {
    const { blobs, spread } = data;
    const first = blobs.filter((blob) => blob.group === 0);
    const own = first.length ? first : blobs;
    const exact = (some) => (x, y, level) => exactNoise(some, spread, x, y, level);
    const both = [guided(exact(blobs), exact(own), w)];
    if (pupil) both.push(guided(pupil.noise(null), pupil.noise(0), w));
    return both;
  };
  const begin = (noise) => ({ walk: chain(start, noise, { method, steps }), states: [] });
  /** State k of a chain, or the last that could be computed until the end of the slice. */
  const state = ({ walk, states }, k, end) => {
    while (states.length <= k && (!states.length || performance.now() < end)) states.push(walk.next().value);
    if (states.length <= k) redraw();
    return states[Math.min(k, states.length - 1)];
  };

  const draw = (drawing, width, panel, title) => {
    const noise = data.blobs.length ? predictions()[panel] : null;
    const side = panelSide(width);
    const k = Math.round(done * steps);
    const level = k === steps ? 1 : table[timesteps(steps)[steps - 1 - k]];
    const field = axes(drawing, {
      left: 40, top: 24, width: side, height: side, x: [-REACH, REACH], y: [-REACH, REACH],
      labels: ["first channel", "second channel"], title,
    });
    drawData(drawing, field, data, level, side / 2 / REACH);
    if (noise) {
      drawScore(drawing, field, noise, Math.min(level, 0.995));
      ways[panel] ??= begin(noise);
      drawAll(drawing, field, state(ways[panel], k, performance.now() + SLICE));
    }
    return field;
  };
  const top = panels(stage);
  const height = (width) => panelSide(width) + 62;
  const views = [
    canvas(top, {
      label: "Points that the exact score moves from noise to the painted data: paint here.",
      height,
      draw: (drawing, width) => { paper = draw(drawing, width, 0, "exact score: paint here"); },
    }),
    canvas(top, {
      label: "The same points, moved by the score of a network.",
      height,
      draw: (drawing, width) => {
        draw(drawing, width, 1, pupil ? `the network after ${pupil.trained} steps` : "a network: not trained");
      },
    }),
  ];
  for (const { element } of views) element.style.flexBasis = "16rem"; // or below each other
  const redraw = () => views.forEach((view) => view.redraw());

  const play = () => {
    done = still() ? 1 : 0;
    playing = !still();
    progress.set(done);
    redraw();
  };
  const shapes = row(stage);
  const kinds = { "six clusters": data, ...presets() };
  for (const [name, kind] of Object.entries(kinds)) {
    button(shapes, { label: name, press: () => { renew(kind); play(); } });
  }
  button(shapes, { label: "erase", press: () => renew({ spread: 0.2, blobs: [] }) });
  const names = [[0, "the class asked for"], [1, "the other class"]];
  choice(shapes, {
    label: "a click paints", options: names, value: 0, change: (value) => { paint = Number(value); },
  });

  const controls = row(stage);
  choice(controls, {
    label: "sampler", options: METHODS, value: method,
    change: (value) => change(() => { method = value; }),
  });
  slider(controls, {
    label: "steps", min: 5, max: 250, step: 5, value: steps,
    change: (value) => change(() => { steps = value; }),
  });
  slider(controls, {
    label: "guidance w", min: 0, max: 6, step: 0.5, value: w, format: (value) => value.toFixed(1),
    change: (value) => change(() => { w = value; }),
  });
  const progress = slider(controls, {
    label: "way to data", min: 0, max: 1, step: 0.01, value: done,
    format: (value) => `${Math.round(100 * value)} %`,
    change: (value) => { done = value; playing = false; redraw(); },
  });
  const actions = row(stage);
  button(actions, { label: "play", press: play });
  button(actions, {
    label: "train the network",
    press: () => {
      if (!data.blobs.length) {
        news("There is nothing to learn: nothing is painted.");
        return;
      }
      const source = random(2);
      const sample = drawPoints(data.blobs, data.spread, 2000, source);
      pupil = { ...trainer(sample, table, source, { steps: STEPS }), trained: 0 };
      done = 1;
      playing = false;
      progress.set(done);
      change(tell);
      train(pupil);
    },
  });
  const news = say(stage);
  const tell = () => {
    const empty = data.blobs.length ? "" : "Nothing is painted: paint on the left, or choose a shape.";
    news(pupil ? `The network has done ${pupil.trained} of ${STEPS} steps.` : empty);
  };

  /** Some milliseconds of training, then a breath for whatever else the page has to do. */
  const train = (learner) => {
    const end = performance.now() + SLICE;
    while (learner.trained < STEPS && performance.now() < end) {
      learner.step();
      learner.trained++;
      const pause = !still() && learner.trained % PAUSE === 0;
      if (pause || learner.trained === STEPS) {
        delete ways[1];
        tell();
        redraw();
      }
    }
    if (learner === pupil && learner.trained < STEPS) setTimeout(train, 0, learner);
  };
  animate(top, (seconds) => {
    if (!playing) return;
    done = Math.min(1, done + seconds / SECONDS);
    playing = done < 1;
    progress.set(done);
    redraw();
  });

  let last = null; // where the brush has been last
  const brush = (px, py) => {
    const [x, y] = paper.of(px, py);
    if (Math.max(Math.abs(x), Math.abs(y)) >= REACH) return;
    if (data.blobs.length >= MOST) {
      news(`More than ${MOST} clusters would be slow: erase them to paint others.`);
      return;
    }
    if (last && Math.hypot(x - last[0], y - last[1]) < data.spread) return;
    last = [x, y];
    const blob = { x, y, weight: 1, group: paint };
    renew({ spread: data.spread, blobs: [...data.blobs.map((one) => ({ ...one, weight: 1 })), blob] });
  };
  pen(views[0], {
    draw: brush,
    end: () => { last = null; },
    where: (px, py) => `at ${paper.of(px, py).map(signed).join(", ")}: ${data.blobs.length} clusters`,
    tell: news,
  });
}

function panelSide(width) {
  return Math.min(width - 56, 360);
}

function signed(value) {
  return value.toFixed(1).replace("-", "−");
}

/** The painted clusters, as they are at this level: further in, and wider by the noise. */
function drawData(pen, field, { blobs, spread }, level, unit) {
  const hue = colours();
  const radius = Math.sqrt(level * spread ** 2 + 1 - level) * unit;
  pen.globalAlpha = 0.25;
  for (const { x, y, group } of blobs) {
    const a = Math.sqrt(level);
    field.dot(a * x, a * y, group === 0 ? hue.blue : hue.orange, Math.min(radius, unit * 0.5));
  }
  pen.globalAlpha = 1;
}

/** Arrows along the score, -noise / b; long ones are drawn shorter than they are. */
function drawScore(pen, field, noise, level) {
  const b = Math.sqrt(1 - level);
  pen.strokeStyle = colours().muted;
  pen.lineWidth = 1;
  for (let x = -1.95; x < REACH; x += 0.39) {
    for (let y = -1.95; y < REACH; y += 0.39) {
      const [u, v] = noise(x, y, level).map((eps) => -eps / b);
      const scale = Math.min(0.3, 0.08 * Math.sqrt(Math.hypot(u, v))) / (Math.hypot(u, v) + 1e-9);
      const [from, to] = [field.at(x, y), field.at(x + scale * u, y + scale * v)];
      pen.beginPath();
      pen.moveTo(...from);
      pen.lineTo(...to);
      pen.stroke();
      pen.fillStyle = colours().muted;
      pen.fillRect(to[0] - 1.5, to[1] - 1.5, 3, 3);
    }
  }
}

function drawAll(pen, field, points) {
  for (let i = 0; i < points.length; i += 2) {
    field.dot(points[i], points[i + 1], colours().green, 2);
  }
}
