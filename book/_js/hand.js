// What a hand does on a canvas, by mouse, by finger and by keyboard.

import { colours, drag } from "./shared.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 10; // CSS pixels that an arrow key moves the pen
const HINT = "Draw by mouse or finger; or arrow keys move the pen, and the space bar puts it down and lifts it.";

/**
 * Let the keyboard work on a canvas that has the focus: arrows call `move(dx, dy)`, with
 * 1 to the right and downwards, and `does` says by its name what another key does.
 */
export function keyboard({ element, redraw }, move, does) {
  element.tabIndex = 0;
  element.setAttribute("role", "application");
  element.addEventListener("keydown", (event) => {
    const known = MOVES[event.key] || does[event.key];
    if (!known || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (MOVES[event.key]) move(...MOVES[event.key]);
    else does[event.key]();
  });
  for (const name of ["focus", "blur"]) element.addEventListener(name, redraw);
}

/**
 * A pen on a canvas: `draw(x, y)` is called in CSS pixels wherever it is down, and `end()`
 * when it is lifted. Without a mouse or a finger, arrows and space bar lead it, and
 * `tell(text)` says where it is in the words of `where(x, y)`. Returns what tells how to
 * draw.
 */
export function pen(view, { draw, end = () => {}, where, tell }) {
  const { element } = view;
  let place = null; // of the keyboard's pen
  let down = false;
  const lift = () => {
    if (down) end();
    down = false;
  };
  const done = () => {
    if (down) draw(...place);
    tell(`${where(...place)}; the pen is ${down ? "down" : "up"}`);
    view.redraw();
  };
  const start = () => [element.clientWidth / 2, element.clientHeight / 2];
  const within = (value, most) => Math.min(most, Math.max(0, value));
  const move = (dx, dy) => {
    const [x, y] = place ?? start();
    place = [within(x + STEP * dx, element.clientWidth), within(y + STEP * dy, element.clientHeight)];
    done();
  };
  const press = () => {
    place ??= start();
    if (down) lift();
    else down = true;
    done();
  };
  keyboard(view, move, { " ": press });
  drag(element, (x, y) => {
    lift();
    place = null;
    draw(x, y);
  }, end);
  const invite = () => tell(HINT);
  element.addEventListener("focus", () => { if (element.matches(":focus-visible")) invite(); });
  element.addEventListener("blur", lift);
  view.over = (drawing) => {
    if (place && document.activeElement === element) cross(drawing, place, down);
  };
  return invite;
}

/** Where the pen of the keyboard is: a cross, with a ring when it is down. */
function cross(drawing, [x, y], down) {
  for (const [thick, hue] of [[5, colours().back], [2, colours().text]]) {
    drawing.lineWidth = thick;
    drawing.strokeStyle = hue;
    drawing.beginPath();
    drawing.moveTo(x - 9, y);
    drawing.lineTo(x + 9, y);
    drawing.moveTo(x, y - 9);
    drawing.lineTo(x, y + 9);
    drawing.stroke();
    if (!down) continue;
    drawing.beginPath();
    drawing.arc(x, y, 9, 0, 2 * Math.PI);
    drawing.stroke();
  }
}
