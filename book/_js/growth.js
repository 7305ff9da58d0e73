// The loss of a run, and what the average of its weights drew from the same noises at
// each of some moments (ch. "Training").

import { axes, bytes, canvas, colours, drag, legend, mosaic, row, slider } from "./shared.js";

const IMAGE = 64; // pixels
const COLUMNS = 8;

export function growth(stage, { k, steps, losses, moments, pixels }) {
  const sketches = bytes(pixels);
  const count = sketches.length / IMAGE / moments.length; // images of a moment
  const sketch = (moment, image) => {
    const first = (moment * count + image) * IMAGE;
    return sketches.subarray(first, first + IMAGE);
  };
  const hues = () => {
    const hue = colours();
    return [hue.red, hue.orange, hue.sky, hue.blue, hue.text];
  };
  const lowest = Math.floor(10 * Math.log10(Math.min(...Object.values(losses).flat()))) / 10;
  const last = steps[steps.length - 1];
  let plot; // the axes as they were drawn last, for the hand

  const curves = canvas(stage, {
    label: "The loss of the run, by quartile of the noise levels; a line marks the moment.",
    height: () => 250,
    draw: (pen, width, height) => {
      const key = Object.keys(losses).map((name, i) => [name, hues()[i]]);
      const top = 3 + legend(pen, key, { left: 46, top: 3, width: width - 66 });
      plot = axes(pen, {
        left: 46, top, width: width - 66, height: height - top - 40, x: [0, last], y: [lowest, 0],
        labels: ["optimiser step", "log₁₀ of the squared error"],
      });
      plot.line([moments[k], moments[k]], [lowest, 0], colours().muted, 3);
      Object.values(losses).forEach((curve, i) => {
        plot.line(steps, curve.map(Math.log10), hues()[i], i === 4 ? 2.6 : 1.6);
      });
    },
  });
  const images = canvas(stage, {
    label: "What the averaged weights draw at this moment from sixteen fixed noises.",
    height: (width) => (Math.ceil(count / COLUMNS) * Math.min(width, 560)) / COLUMNS + 36,
    draw: (pen, width) => {
      const cell = Math.min(width, 560) / COLUMNS;
      pen.textAlign = "center";
      for (let i = 0; i < count; i++) {
        const [left, top] = [(i % COLUMNS) * cell, Math.floor(i / COLUMNS) * (cell + 18)];
        pen.fillStyle = colours().muted;
        pen.fillText(i % 10, left + cell / 2 - 2, top + 13);
        mosaic(pen, sketch(k, i), {
          left: Math.round(left), top: Math.round(top) + 18, size: Math.floor(cell) - 4,
          colour: (grey) => `rgb(${grey} ${grey} ${grey})`,
        });
      }
    },
  });
  const move = (moment) => {
    k = moment;
    curves.redraw();
    images.redraw();
  };
  const control = slider(row(stage), {
    label: "moment", min: 0, max: moments.length - 1, step: 1, value: k,
    format: (moment) => `step ${moments[moment]}`, change: move,
  });
  drag(curves.element, (x) => {
    const [there] = plot.of(x, 0);
    const away = moments.map((moment) => Math.abs(moment - there));
    control.set(away.indexOf(Math.min(...away)));
    move(Number(control.value));
  });
  curves.element.style.touchAction = "pan-y";
}
