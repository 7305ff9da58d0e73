// A list of numbers, drawn by hand.

import { pen } from "./hand.js";

/**
 * Let a hand write into what `values()` returns. `of(x, y)` says which [index, value] a
 * place of the canvas means; what a quick hand leaves out is filled in. `tell(text)` is
 * for those who draw with the keyboard. Returns what tells how to draw.
 */
export function sketch(view, { values, of, change, tell }) {
  let last = null;
  const there = (x, y) => {
    const [far, height] = of(x, y);
    return [Math.min(values().length - 1, Math.max(0, Math.floor(far))), height];
  };
  const draw = (x, y) => {
    const list = values();
    const [here, height] = there(x, y);
    const [before, other] = last ?? [here, height];
    const way = Math.max(1, Math.abs(here - before));
    for (let k = 0; k <= way; k++) {
      const index = Math.round(before + ((here - before) * k) / way);
      list[index] = other + ((height - other) * k) / way;
    }
    last = [here, height];
    change();
  };
  const where = (x, y) => {
    const [index, height] = there(x, y);
    return `position ${index}, value ${height.toFixed(2).replace("-", "−")}`;
  };
  return pen(view, { draw, end: () => { last = null; }, where, tell });
}
