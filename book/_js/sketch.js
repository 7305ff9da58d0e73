// A list of numbers, drawn by hand.

import { drag } from "./shared.js";

/**
 * Let a mouse or a finger write into what `values()` returns. `of(x, y)` says which
 * [index, value] a place of the canvas means; what a quick hand leaves out is filled in.
 */
export function sketch(element, values, of, change) {
  let last = null;
  const stroke = (x, y) => {
    const list = values();
    const [far, height] = of(x, y);
    const here = Math.min(list.length - 1, Math.max(0, Math.floor(far)));
    const [there, other] = last ?? [here, height];
    const way = Math.max(1, Math.abs(here - there));
    for (let k = 0; k <= way; k++) {
      const index = Math.round(there + ((here - there) * k) / way);
      list[index] = other + ((height - other) * k) / way;
    }
    last = [here, height];
    change();
  };
  drag(element, stroke, () => { last = null; });
}
