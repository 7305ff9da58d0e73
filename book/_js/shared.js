// What all explorables share: a canvas that knows theme and size, controls with names.

/** Okabe and Ito's colours, as in the book's other figures, a little lighter on dark. */
const LIGHT = {
  blue: "#0072b2", orange: "#b97800", green: "#00785a", red: "#d55e00", sky: "#56b4e9",
  text: "#222832", muted: "#5a6370", line: "#c9ced6", back: "#ffffff",
};
const DARK = {
  blue: "#5bb3e8", orange: "#e69f00", green: "#2fc79a", red: "#ff8a4c", sky: "#a8d8f5",
  text: "#ced6dd", muted: "#a0a9b3", line: "#49525c", back: "#121212",
};

/** The colours of the theme that the page has now. */
export function colours() {
  return document.documentElement.dataset.theme === "dark" ? DARK : LIGHT;
}

/** Whether someone has asked for less motion. */
export function still() {
  return window.matchMedia("(prefers-reduced-motion: reduce)").matches;
}

/**
 * A canvas as wide as its parent; `height(width)` and `draw(pen, width, height)` are in
 * CSS pixels. Returns the canvas, `redraw`, which draws once before the next frame, and
 * `over`, which may be set to what draws on top of it.
 */
export function canvas(parent, { label, height, draw }) {
  const element = document.createElement("canvas");
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  parent.append(element);
  const pen = element.getContext("2d");
  let waiting = false;
  const paint = () => {
    waiting = false;
    const width = element.clientWidth;
    if (!width) return;
    const tall = Math.round(height(width));
    const scale = window.devicePixelRatio || 1;
    element.style.height = `${tall}px`;
    element.width = Math.round(width * scale);
    element.height = Math.round(tall * scale);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, tall);
    pen.font = `${width < 300 ? 12 : 13}px sans-serif`;
    pen.lineWidth = 1.6;
    pen.lineJoin = "round";
    draw(pen, width, tall);
    view.over(pen);
  };
  const redraw = () => {
    if (!waiting) requestAnimationFrame(paint);
    waiting = true;
  };
  new ResizeObserver(redraw).observe(element);
  const theme = { attributes: true, attributeFilter: ["data-theme"] };
  new MutationObserver(redraw).observe(document.documentElement, theme);
  const view = { element, redraw, over: () => {} };
  redraw();
  return view;
}

/** A row for controls. */
export function row(parent) {
  const element = document.createElement("div");
  element.className = "explorable-controls";
  parent.append(element);
  return element;
}

/** A row for canvases, which stand below each other where there is no room. */
export function panels(parent) {
  const element = document.createElement("div");
  element.className = "explorable-panels";
  parent.append(element);
  return element;
}

/** A line of text that changes, read aloud when it does; returns what sets it. */
export function say(parent) {
  const element = document.createElement("p");
  element.className = "explorable-says";
  element.setAttribute("role", "status");
  parent.append(element);
  return (text) => {
    element.textContent = text;
  };
}

/** A slider with its name and its value; `input.set(value)` moves it. */
export function slider(parent, options) {
  const { label, min, max, step, value, format = String, change } = options;
  const [box, input] = named(parent, label, "input");
  Object.assign(input, { type: "range", min, max, step });
  const output = document.createElement("output");
  box.append(output);
  const say = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.set = (number) => {
    input.value = number;
    say();
  };
  input.set(value);
  input.addEventListener("input", () => {
    say();
    change(Number(input.value));
  });
  return input;
}

/** A list from which one thing is chosen; `options` are [value, text]. */
export function choice(parent, { label, options, value, change }) {
  const [, select] = named(parent, label, "select");
  for (const [key, text] of options) select.add(new Option(text, key));
  select.value = value;
  select.addEventListener("change", () => change(select.value));
  return select;
}

/** A box to tick. */
export function check(parent, { label, value, change }) {
  const [, input] = named(parent, label, "input");
  Object.assign(input, { type: "checkbox", checked: value });
  input.addEventListener("change", () => change(input.checked));
  return input;
}

/** A button. */
export function button(parent, { label, press }) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = label;
  element.addEventListener("click", press);
  parent.append(element);
  return element;
}

/** A control with its name: the box of both, and the control. */
export function named(parent, label, kind) {
  const box = document.createElement("label");
  const text = document.createElement("span");
  text.textContent = label;
  const control = document.createElement(kind);
  control.autocomplete = "off"; // who comes back to a page finds where the picture begins
  box.append(text, control);
  parent.append(box);
  return [box, control];
}

/**
 * Call `move(x, y)` in CSS pixels of a canvas while a mouse or a finger is down on it.
 * Whatever can be dragged needs a slider besides, and whatever is drawn the pen of
 * `hand.js`, for those who use neither.
 */
export function drag(element, move, end = () => {}) {
  element.style.touchAction = "none";
  const tell = (event) => {
    const box = element.getBoundingClientRect();
    move(event.clientX - box.left, event.clientY - box.top);
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button || !event.isPrimary) return; // a menu, or a second finger
    element.setPointerCapture(event.pointerId);
    tell(event);
  });
  element.addEventListener("pointermove", (event) => {
    if (element.hasPointerCapture(event.pointerId)) tell(event);
  });
  for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, end);
}

/** Call `step(seconds)` before every frame while the element can be seen. */
export function animate(element, step) {
  let before = null;
  let seen = false;
  const frame = (now) => {
    if (!seen) return;
    step(Math.min(0.05, (now - (before ?? now)) / 1000));
    before = now;
    requestAnimationFrame(frame);
  };
  new IntersectionObserver(([entry]) => {
    const starts = entry.isIntersecting && !seen;
    seen = entry.isIntersecting;
    before = null;
    if (starts) requestAnimationFrame(frame);
  }).observe(element);
}

/** The bytes that Python's `base64.b64encode` has made a text of. */
export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** A square image of small squares, row by row; `colour(value)` says how each looks. */
export function mosaic(pen, values, { left, top, size, colour }) {
  const side = Math.sqrt(values.length);
  const edge = (k) => Math.round((k * size) / side);
  values.forEach((value, k) => {
    const [r, c] = [Math.floor(k / side), k % side];
    pen.fillStyle = colour(value);
    pen.fillRect(left + edge(c), top + edge(r), edge(c + 1) - edge(c), edge(r + 1) - edge(r));
  });
}

/** What the colours of `entries` [name, colour] stand for, in rows; says where they end. */
export function legend(pen, entries, { left, top, width }) {
  pen.textAlign = "left";
  let x = left;
  for (const [name, colour] of entries) {
    const wide = pen.measureText(name).width + 17;
    if (x > left && x + wide > left + width) {
      x = left;
      top += 18;
    }
    pen.fillStyle = colour;
    pen.fillRect(x, top, 12, 12);
    pen.fillStyle = colours().text;
    pen.fillText(name, x + 17, top + 11);
    x += wide + 19;
  }
  return top + 18;
}

/**
 * A rectangle of a canvas with coordinates: `at(x, y)` in pixels, `of(px, py)` back,
 * and pens for lines, dots and shaded areas (from one corner to the other) inside it.
 */
export function axes(pen, { left, top, width, height, x, y, labels = ["", ""], title = "" }) {
  const hue = colours();
  const at = (a, b) => [
    left + ((a - x[0]) / (x[1] - x[0])) * width,
    top + height - ((b - y[0]) / (y[1] - y[0])) * height,
  ];
  const of = (a, b) => [
    x[0] + ((a - left) / width) * (x[1] - x[0]),
    y[0] + ((top + height - b) / height) * (y[1] - y[0]),
  ];
  pen.strokeStyle = hue.line;
  pen.strokeRect(left, top, width, height);
  pen.fillStyle = hue.text;
  pen.textAlign = "center";
  pen.fillText(title, left + width / 2, top - 8);
  pen.fillText(labels[0], left + width / 2, top + height + 30);
  pen.save();
  pen.translate(left - 30, top + height / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(labels[1], 0, 0);
  pen.restore();
  pen.fillStyle = hue.muted;
  const text = (number) => String(number).replace("-", "−");
  pen.fillText(text(x[0]), left, top + height + 15);
  pen.fillText(text(x[1]), left + width, top + height + 15);
  pen.textAlign = "right";
  pen.fillText(text(y[0]), left - 5, top + height);
  pen.fillText(text(y[1]), left - 5, top + 9);
  const clipped = (paint) => {
    pen.save();
    pen.beginPath();
    pen.rect(left, top, width, height);
    pen.clip();
    paint();
    pen.restore();
  };
  const line = (xs, ys, colour, thick = 1.6, dash = []) =>
    clipped(() => {
      pen.beginPath();
      for (let i = 0; i < xs.length; i++) pen.lineTo(...at(xs[i], ys[i]));
      pen.strokeStyle = colour;
      pen.lineWidth = thick;
      pen.setLineDash(dash);
      pen.stroke();
    });
  const area = (a, b, c, d, colour) =>
    clipped(() => {
      pen.fillStyle = colour;
      pen.globalAlpha = 0.15;
      pen.fillRect(...at(a, d), at(c, b)[0] - at(a, d)[0], at(c, b)[1] - at(a, d)[1]);
    });
  const dot = (a, b, colour, radius = 5) =>
    clipped(() => {
      pen.beginPath();
      pen.arc(...at(a, b), radius, 0, 2 * Math.PI);
      pen.fillStyle = colour;
      pen.fill();
    });
  return { at, of, line, dot, area };
}
