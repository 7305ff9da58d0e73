// What one block costs, ours and a transformer's, as length and width grow (ch.
// "Efficiency").

import { axes, canvas, choice, colours, legend, row, slider } from "./shared.js";

/** Multiply-adds of a block of DiffuSSM for one image of B, without its condition:
 * eq-efficiency-block, and its share of the kernels, which the whole batch has in common. */
export function diffussmBlock(L, D, M, N, B) {
  const n = 2 * L;
  return {
    "linear maps": ((13 * L) / M + L) * D * D,
    convolution: D * (3 * 1.25 * n * Math.log2(n) + 8 * (L + 1)),
    kernels: (2 * L * N * D) / B,
  };
}

/** The same of a transformer's block: eq-efficiency-dit. */
export function ditBlock(L, D) {
  return {
    "linear maps": 12 * L * D * D,
    attention: 2 * L * L * D,
  };
}

const sum = (parts) => Object.values(parts).reduce((a, b) => a + b);

export function ratio(L, D, M, N, B) {
  return sum(ditBlock(L, D)) / sum(diffussmBlock(L, D, M, N, B));
}

const billions = (count) => (count / 1e9).toLocaleString("en", { maximumSignificantDigits: 3 });

export function block_cost(stage, { states, log_length, width, downsample, log_batch }) {
  const lengths = Array.from({ length: 65 }, (_, k) => 6 + k / 8);
  const draw = (pen, wide, tall) => {
    const hue = colours();
    const L = 2 ** log_length;
    const times = (length) => ratio(length, width, downsample, states, 2 ** log_batch);
    const ours = diffussmBlock(L, width, downsample, states, 2 ** log_batch);
    const theirs = ditBlock(L, width);
    const unit = (wide - 24) / Math.max(sum(ours), sum(theirs));
    const bar = (top, name, parts, tints) => {
      pen.fillStyle = hue.text;
      pen.textAlign = "left";
      pen.fillText(`${name}: ${billions(sum(parts))} billion multiply-adds`, 12, top);
      let left = 12;
      Object.values(parts).forEach((count, k) => {
        pen.fillStyle = tints[k];
        pen.fillRect(left, top + 7, count * unit, 22);
        left += count * unit;
      });
    };
    bar(16, "DiffuSSM", ours, [hue.blue, hue.sky, hue.green]);
    bar(66, "transformer", theirs, [hue.blue, hue.orange]);
    const key = [
      ["dense maps", hue.blue], ["convolution", hue.sky], ["kernels", hue.green], ["attention", hue.orange],
    ];
    const top = 14 + legend(pen, key, { left: 12, top: 108, width: wide - 24 });
    const highest = Math.ceil(times(2 ** 14));
    const curve = axes(pen, {
      left: 50, top, width: wide - 70, height: tall - 45 - top, x: [6, 14], y: [0, highest],
      labels: ["log₂ of the length L", "transformer / DiffuSSM"],
    });
    curve.line([6, 14], [1, 1], hue.line, 1);
    curve.line(lengths, lengths.map((l) => times(2 ** l)), hue.text, 2);
    curve.dot(log_length, times(L), hue.red, 6);
    const [x, y] = curve.at(log_length, times(L));
    pen.fillStyle = hue.text;
    pen.textAlign = log_length > 8 ? "right" : "left"; // above the curve, which rises
    pen.fillText(`${times(L).toFixed(2)} times`, x + (log_length > 8 ? -6 : 0), Math.max(y - 12, top + 15));
  };
  const view = canvas(stage, {
    label: "Multiply-adds of a block of DiffuSSM and of a transformer, and their ratio.",
    height: () => 360,
    draw,
  });
  const controls = row(stage);
  slider(controls, {
    label: "length L", min: 6, max: 14, step: 1, value: log_length,
    format: (value) => String(2 ** value),
    change: (value) => { log_length = value; view.redraw(); },
  });
  slider(controls, {
    label: "width D", min: 128, max: 2048, step: 128, value: width,
    change: (value) => { width = value; view.redraw(); },
  });
  choice(controls, {
    label: "downsampling M", options: [[1, "1"], [2, "2"], [4, "4"]], value: downsample,
    change: (value) => { downsample = Number(value); view.redraw(); },
  });
  slider(controls, {
    label: "batch B", min: 0, max: 8, step: 1, value: log_batch,
    format: (value) => String(2 ** value),
    change: (value) => { log_batch = value; view.redraw(); },
  });
}
