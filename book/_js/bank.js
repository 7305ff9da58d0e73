// The kernels of a block, each as an image of 8 x 8 lags, before and after training:
// click one (ch. "Size and place").

import { bytes, canvas, choice, colours, mosaic, panels, row, say, slider } from "./shared.js";

const LAGS = 64;
const COLUMNS = 12;

/** The kernel in one of Python's texts, -1 to 1. */
export function kernelOf(text, number) {
  const found = bytes(text).subarray(LAGS * number, LAGS * (number + 1));
  return Array.from(found, (level) => (level - 128) / 127);
}

/** How much of a kernel's energy, lag 0 aside, is at lags that are multiples of 8. */
export function wholeRows(K) {
  const energy = (list) => list.reduce((sum, value) => sum + value * value, 0);
  return energy(K.filter((_, l) => l && l % 8 === 0)) / energy(K.slice(1));
}

export function bank(stage, given) {
  let { network, direction, kernel } = given;
  const text = () => given[network][direction];
  const count = bytes(text()).length / LAGS;
  const shade = (hue) => (value) => {
    const strength = Math.round(255 * Math.min(1, Math.abs(value)));
    return (value > 0 ? hue.blue : hue.orange) + strength.toString(16).padStart(2, "0");
  };
  const places = (wide) => {
    const size = Math.floor((wide - 8) / COLUMNS) - 3;
    return Array.from({ length: count }, (_, k) => ({
      left: 4 + (size + 3) * (k % COLUMNS), top: 24 + (size + 3) * Math.floor(k / COLUMNS), size,
    }));
  };
  const drawOne = (pen, number, { left, top, size }, hue, chosen) => {
    mosaic(pen, kernelOf(text(), number), { left, top, size, colour: shade(hue) });
    pen.strokeStyle = chosen ? hue.red : hue.line;
    pen.lineWidth = chosen ? 2.5 : 0.5;
    pen.strokeRect(left, top, size, size);
  };
  const title = (pen, words, middle, hue) => {
    pen.fillStyle = hue.text;
    pen.textAlign = "center";
    pen.fillText(words, middle, 14);
  };

  const both = panels(stage);
  const views = [
    canvas(both, {
      label: "All kernels of the last block, as small images: click one.",
      height: (wide) => Math.max(...places(wide).map(({ top, size }) => top + size)) + 6,
      draw: (pen, wide) => {
        const hue = colours();
        title(pen, `${count} kernels: click one`, wide / 2, hue);
        places(wide).forEach((place, k) => drawOne(pen, k, place, hue, false));
        drawOne(pen, kernel, places(wide)[kernel], hue, true);
      },
    }),
    canvas(both, {
      label: "The chosen kernel as a large image.",
      height: (wide) => Math.min(wide - 8, 280) + 34,
      draw: (pen, wide) => {
        const hue = colours();
        const size = Math.min(wide - 8, 280);
        title(pen, "lags 0 to 63, row by row", wide / 2, hue);
        drawOne(pen, kernel, { left: (wide - size) / 2, top: 24, size }, hue, false);
      },
    }),
  ];
  const told = say(stage);
  const change = () => {
    for (const view of views) view.redraw();
    const share = Math.round(100 * wholeRows(kernelOf(text(), kernel)));
    told(`Kernel ${kernel + 1}: ${share} percent of its energy beyond lag 0 is at whole rows.`);
  };
  const controls = row(stage);
  choice(controls, {
    label: "network", value: network,
    options: [["trained", "trained"], ["random", "random weights"]],
    change: (value) => { network = value; change(); },
  });
  choice(controls, {
    label: "direction", value: direction,
    options: [["forward", "forward"], ["backward", "backward"]],
    change: (value) => { direction = value; change(); },
  });
  const number = slider(controls, {
    label: "kernel", min: 0, max: count - 1, step: 1, value: kernel,
    format: (value) => String(value + 1), change: (value) => { kernel = value; change(); },
  });
  for (const { element } of views) element.style.flexBasis = "18rem"; // not both on a phone
  views[0].element.style.cursor = "pointer";
  views[0].element.addEventListener("click", ({ offsetX: x, offsetY: y }) => {
    const found = places(views[0].element.clientWidth).findIndex(({ left, top, size }) =>
      x >= left && x < left + size + 3 && y >= top && y < top + size + 3);
    if (found < 0) return;
    kernel = found;
    number.set(kernel);
    change();
  });
  change();
}
