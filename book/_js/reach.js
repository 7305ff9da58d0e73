// Click a pixel: what reaches the noise that a network predicts there, before and after
// training, in both directions and forward alone (ch. "Size and place").

import { bytes, canvas, choice, colours, drag, mosaic, row, slider } from "./shared.js";

const SIDE = 8; // of the image
const PIXELS = SIDE * SIDE;
const TRAINED = { name: "trained", M: 2 };
// matplotlib's cividis, at equal distances
const CIVIDIS = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
  [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
];

/** The row of the Jacobian that belongs to a predicted pixel: 0 nothing, 1 to 255. */
export function rowOf(text, pixel) {
  return bytes(text).subarray(PIXELS * pixel, PIXELS * (pixel + 1));
}

export function reach(stage, given) {
  let { row: r, column: c, direction, M } = given;
  let places = []; // the panels as they were drawn last, for the hand

  const draw = (pen, width) => {
    const hue = colours();
    const size = SIDE * Math.floor(Math.min((width - 20) / 2, 280) / SIDE);
    const shown = [{ name: `random, M = ${M}`, M: Number(M) }, TRAINED];
    places = shown.map((network, k) => {
      const place = { left: 2 + k * (size + 14), top: 24, size };
      pen.fillStyle = hue.text;
      pen.textAlign = "center";
      pen.fillText(network.name, place.left + size / 2, 14);
      const levels = rowOf(given[network.name][direction], SIDE * r + c);
      mosaic(pen, levels, { ...place, colour: (level) => (level ? shade(level) : hue.back) });
      pen.strokeStyle = hue.line;
      pen.lineWidth = 1;
      pen.strokeRect(place.left, place.top, size, size);
      frame(pen, place, network.M, 1.5);
      frame(pen, place, 1, 4);
      return place;
    });
    drawScale(pen, { left: 2, top: size + 34, width: 2 * size + 14, hue });
  };
  const frame = (pen, { left, top, size }, length, thick) => {
    const cell = size / SIDE;
    const first = length * Math.floor(c / length);
    pen.strokeStyle = "#ff5a1f";
    pen.lineWidth = thick;
    pen.strokeRect(left + first * cell, top + r * cell, length * cell, cell);
  };
  const view = canvas(stage, {
    label: "What reaches the framed pixel, in a network with random weights and in the trained one.",
    height: (width) => SIDE * Math.floor(Math.min((width - 20) / 2, 280) / SIDE) + 72,
    draw,
  });
  const controls = row(stage);
  const whole = { min: 0, max: SIDE - 1, step: 1 };
  const down = slider(controls, {
    label: "row", ...whole, value: r, change: (value) => { r = value; view.redraw(); },
  });
  const across = slider(controls, {
    label: "column", ...whole, value: c, change: (value) => { c = value; view.redraw(); },
  });
  choice(controls, {
    label: "read", options: [["both", "in both directions"], ["forward", "forward only"]],
    value: direction, change: (value) => { direction = value; view.redraw(); },
  });
  choice(controls, {
    label: "M of the random network", options: [1, 2, 4].map((m) => [m, m]), value: M,
    change: (value) => { M = value; view.redraw(); },
  });
  drag(view.element, (x, y) => {
    for (const { left, top, size } of places) {
      const [over, under] = [(SIDE * (x - left)) / size, (SIDE * (y - top)) / size];
      if (Math.min(over, under) < 0 || Math.max(over, under) >= SIDE) continue;
      [r, c] = [Math.floor(under), Math.floor(over)];
      down.set(r);
      across.set(c);
      view.redraw();
    }
  });
  view.element.style.touchAction = "pan-y";
  view.element.style.cursor = "pointer";
}

/** The colour of a level from 1 to 255. */
function shade(level) {
  const place = ((level - 1) / 254) * (CIVIDIS.length - 1);
  const k = Math.min(Math.floor(place), CIVIDIS.length - 2);
  const mixed = CIVIDIS[k].map((from, i) => from + (place - k) * (CIVIDIS[k + 1][i] - from));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

function drawScale(pen, { left, top, width, hue }) {
  for (let k = 0; k < 100; k++) {
    pen.fillStyle = shade(1 + 2.54 * k);
    pen.fillRect(left + (k * width) / 100, top, width / 100 + 1, 10);
  }
  pen.fillStyle = hue.muted;
  pen.textAlign = "left";
  pen.fillText("\u2264 0.003", left, top + 26);
  pen.textAlign = "center";
  pen.fillText("derivative / the largest", left + width / 2, top + 26);
  pen.textAlign = "right";
  pen.fillText("1", left + width, top + 26);
}
