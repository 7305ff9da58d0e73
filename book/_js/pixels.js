// Images of eight by eight pixels: shown, shown in a strip, and drawn by hand.

import { bytesOf } from "./half.js";
import { keyboard } from "./hand.js";
import { canvas, colours, drag } from "./shared.js";

export const SIDE = 8;
export const COLUMNS = 8; // of a strip
const MARGIN = 28; // of a strip, for what its rows are

/** The images that a text of bytes stands for, from -1 for black to 1 for white. */
export function imagesOf(base64) {
  const bytes = bytesOf(base64);
  return Array.from({ length: bytes.length / SIDE ** 2 }, (_, k) => {
    const image = bytes.subarray(k * SIDE ** 2, (k + 1) * SIDE ** 2);
    return Float32Array.from(image, (level) => level / 127.5 - 1);
  });
}

/** An image as squares, its corner at (left, top). */
function paint(pen, image, left, top, size) {
  const edge = size / SIDE;
  image.forEach((value, i) => {
    const level = Math.round(127.5 * (Math.max(-1, Math.min(1, value)) + 1));
    pen.fillStyle = `rgb(${level}, ${level}, ${level})`;
    const [x, y] = [left + (i % SIDE) * edge, top + Math.floor(i / SIDE) * edge];
    pen.fillRect(x, y, edge + 0.5, edge + 0.5); // no seams
  });
}

/** The steps, of some number, that a strip has room for: the first and the last too. */
export function shownSteps(steps) {
  const columns = Math.min(steps, COLUMNS);
  const apart = (steps - 1) / Math.max(columns - 1, 1);
  return Array.from({ length: columns }, (_, k) => Math.round(k * apart));
}

/** Columns {x, image, t} side by side: what the chain holds, and what is predicted. */
export function strip(parent, label) {
  let columns = [];
  const view = canvas(parent, {
    label,
    height: (width) => (2 * (width - MARGIN)) / COLUMNS + 24,
    draw(pen, width) {
      const edge = (width - MARGIN) / COLUMNS;
      const hue = colours();
      pen.fillStyle = hue.text;
      pen.font = "italic 18px serif";
      pen.fillText("xₜ", 0, edge / 2 + 5);
      pen.fillText("x̂₀", 0, edge * 1.5 + 5);
      pen.font = "12px sans-serif";
      pen.textAlign = "center";
      pen.fillStyle = hue.muted;
      columns.forEach(({ x, image, t }, k) => {
        const left = MARGIN + k * edge;
        if (t !== undefined) pen.fillText(t, left + edge / 2, 2 * edge + 14);
        pen.save();
        paint(pen, x, left, 0, edge - 4);
        paint(pen, image, left, edge, edge - 4);
        pen.restore();
      });
    },
  });
  return {
    show(given) {
      columns = given;
      view.redraw();
    },
  };
}

/**
 * A large picture that can be drawn on, by mouse, touch and keyboard. `drawn(image)` is
 * told what has become of it, `at(place)` where the keyboard is, `enter` is for the key.
 */
export function board(parent, { label, drawn, at, enter }) {
  let image = new Float32Array(SIDE ** 2).fill(-1);
  let cursor = null; // the pixel that the keyboard is at
  let ink = null; // what is being drawn, while a finger is down
  let last = null; // where it has been last
  const view = canvas(parent, {
    label,
    height: (width) => width,
    draw(pen, width) {
      paint(pen, image, 0, 0, width);
      if (cursor !== null && document.activeElement === view.element) {
        frame(pen, cursor, width / SIDE);
      }
    },
  });
  const show = (given) => {
    image = given;
    view.redraw();
  };
  const turn = (pixel, value) => {
    const next = image.slice();
    next[pixel] = value;
    show(next);
    drawn(next);
  };
  const opposite = (pixel) => (image[pixel] > 0 ? -1 : 1);

  const within = (place) => Math.max(0, Math.min(SIDE - 1, Math.floor(place)));
  const draw = (x, y) => {
    const edge = view.element.clientWidth / SIDE;
    const here = [x / edge, y / edge];
    const from = last ?? here;
    const apart = Math.max(...here.map((to, k) => Math.abs(to - from[k])));
    const parts = Math.max(1, Math.ceil(2 * apart)); // half a pixel each: a quick hand leaves none out
    cursor = null;
    for (let k = 1; k <= parts; k++) {
      const [column, line] = here.map((to, i) => within(from[i] + ((to - from[i]) * k) / parts));
      const pixel = line * SIDE + column;
      ink ??= opposite(pixel);
      if (image[pixel] !== ink) turn(pixel, ink);
    }
    last = here;
  };
  drag(view.element, draw, () => { ink = last = null; });

  const tell = () => {
    view.redraw();
    const place = `row ${Math.floor(cursor / SIDE) + 1}, column ${(cursor % SIDE) + 1}`;
    at(`${place}: ${image[cursor] > 0 ? "white" : "black"}`);
  };
  const move = (dx, dy) => {
    cursor ??= 0;
    const [line, column] = [Math.floor(cursor / SIDE), cursor % SIDE];
    cursor = within(line + dy) * SIDE + within(column + dx);
    tell();
  };
  const press = () => {
    cursor ??= 0;
    turn(cursor, opposite(cursor));
    tell();
  };
  keyboard(view, move, { " ": press, Enter: enter });
  return { show, image: () => image };
}

/** Where the keyboard is: white around blue, to be seen on any grey. */
function frame(pen, pixel, edge) {
  const [left, top] = [(pixel % SIDE) * edge, Math.floor(pixel / SIDE) * edge];
  for (const [thick, hue] of [[5, "#ffffff"], [2.5, "#0072b2"]]) {
    pen.lineWidth = thick;
    pen.strokeStyle = hue;
    pen.strokeRect(left + 2.5, top + 2.5, edge - 5, edge - 5);
  }
}
