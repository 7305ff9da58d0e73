// Days and money for a run, by the cards, their price and the share of their peak that is
// reached (ch. "The bill").

import { axes, canvas, choice, colours, row, slider } from "./shared.js";

/** Hours for operations by precision at a share of the peak of so many cards. */
export function hours(operations, peaks, share, cards) {
  let total = 0;
  for (const [precision, count] of Object.entries(operations)) {
    total += count / (3600 * peaks[precision] * share * cards);
  }
  return total;
}

export function bill(stage, { recipes, cards, recipe, card, gpus, percent, price }) {
  const draw = (pen, wide, tall) => {
    const hue = colours();
    const tints = [hue.blue, hue.orange, hue.green];
    const spent = Object.entries(recipes[recipe]).map(([what, operations]) => [
      what, hours(operations, cards[card], percent / 100, gpus),
    ]);
    const whole = spent.reduce((a, [, b]) => a + b, 0);
    pen.fillStyle = hue.text;
    pen.textAlign = "left";
    const { font } = pen;
    pen.font = "600 17px sans-serif";
    const euros = Math.round(whole * gpus * price).toLocaleString("en");
    pen.fillText(`${(whole / 24).toFixed(1)} days, ${euros} EUR`, 12, 22);
    pen.font = font;
    const longest = Math.max(...spent.map(([, time]) => time));
    spent.forEach(([what, time], k) => {
      const top = 46 + 42 * k;
      pen.fillStyle = hue.text;
      pen.fillText(`${what}: ${(time / 24).toFixed(1)} days`, 12, top);
      pen.fillStyle = tints[k];
      pen.fillRect(12, top + 6, (time / longest) * (wide - 24), 16);
    });
    const counts = Array.from({ length: 64 }, (_, k) => k + 1);
    const days = counts.map((n) => (whole * gpus) / n / 24);
    const top = Math.ceil(Math.max(days[3], (1.1 * whole) / 24)); // the dot is within
    const curve = axes(pen, {
      left: 50, top: 180, width: wide - 70, height: tall - 225, x: [1, 64], y: [0, top],
      labels: ["GPUs", "days"],
    });
    curve.line(counts, days, hue.text, 2);
    curve.dot(gpus, whole / 24, hue.red, 6);
  };
  const view = canvas(stage, {
    label: "Days for encoding, training and sampling, and what they cost.",
    height: () => 360,
    draw,
  });
  const controls = row(stage);
  const names = (table) => Object.keys(table).map((name) => [name, name]);
  choice(controls, {
    label: "recipe", options: names(recipes), value: recipe,
    change: (value) => { recipe = value; view.redraw(); },
  });
  choice(controls, {
    label: "card", options: names(cards), value: card,
    change: (value) => { card = value; view.redraw(); },
  });
  slider(controls, {
    label: "GPUs", min: 1, max: 64, step: 1, value: gpus,
    change: (value) => { gpus = value; view.redraw(); },
  });
  slider(controls, {
    label: "MFU", min: 5, max: 60, step: 1, value: percent,
    format: (value) => `${value}%`,
    change: (value) => { percent = value; view.redraw(); },
  });
  slider(controls, {
    label: "price of a GPU hour", min: 0.5, max: 5, step: 0.1, value: price,
    format: (value) => `${value.toFixed(2)} EUR`,
    change: (value) => { price = value; view.redraw(); },
  });
}
