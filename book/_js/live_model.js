// The trained digits model in the page: ask for a digit and watch it grow, or draw one
// and let the model go on (appendix, "The model in the page").

import { ModelClient } from "./model_client.js";
import { board, imagesOf, shownSteps, strip } from "./pixels.js";
import { button, choice, named, row, slider, still } from "./shared.js";

const LARGEST_SEED = 999999;

/**
 * `label`, `seed`, `steps`, `guidance` and `method` are where the controls begin;
 * `strip` is a digit that was drawn when the page was made; `auto`: draw one at once.
 */
export function liveModel(stage, { strip: prepared, auto, ...first }) {
  const asked = { label: 3, seed: 0, steps: 25, guidance: 1.5, method: "ddim", ...first };
  let noisiest = 500; // where the chain begins that goes on from a drawing
  let drawing = null; // what was drawn by hand
  let columns = []; // of the strip

  const say = (state, text) => {
    stage.dataset.state = state;
    status.textContent = text;
  };

  /** Ask for a digit, or for what the drawing becomes; `change` is what is new. */
  const ask = (change) => {
    Object.assign(asked, change);
    if ("label" in change) drawing = null;
    for (const key of digits.children) {
      key.setAttribute("aria-pressed", key.dataset.class === String(asked.label));
    }
    say("asked", "The model is asked …");
    columns = [];
    model.ask(drawing ? { ...asked, image: drawing, noisiest } : asked);
  };

  const wish = () => (asked.guidance > 0 ? `a ${asked.label}` : "any digit, as guidance 0 asks for none");

  const goOn = () => {
    drawing ??= big.image();
    ask({});
  };

  const drawn = (image) => {
    drawing = image;
    model.cancel();
    say("drawn", `Your drawing. Let the model go on from it to ${wish()}; a digit's button begins anew.`);
  };

  const model = new ModelClient(({ t, taken, steps, before, x, image, last }) => {
    if (shownSteps(steps).includes(taken)) columns.push({ x: before, image, t });
    if (still() && !last) return; // only what comes of it
    big.show(x);
    small.show(columns);
    const what = drawing ? "going on from the drawing to" : "drawing";
    say("drawing", `${what} ${wish()}, at noise level t = ${t}`);
    const outcome = drawing ? `What the drawing became, asked for ${wish()}.` : `${wish()}.`.replace(/^a/, "A");
    if (last) say("done", outcome);
  }, ({ message }) => say("failed", `The model failed: ${message}. Ask again to restart it.`));

  stage.classList.add("live-model");
  const digits = digitKeys(stage, ask);
  const pictures = part(stage, "div", "live-model-pictures");
  const big = board(part(pictures, "div", "live-model-digit"), {
    label: "Eight by eight pixels, to draw on: arrow keys move, space turns a pixel over",
    drawn,
    at: (place) => { status.textContent = place; },
    enter: goOn,
  });
  const label = "Above, what the chain holds; below, the digit that the network predicts";
  const small = strip(part(pictures, "div", "live-model-strip"), label);
  const status = part(stage, "p", "live-model-status");
  status.setAttribute("role", "status");
  controls(stage, asked, ask);
  const hint = part(stage, "p", "live-model-hint");
  hint.textContent =
    "Or draw: click into the picture, or move there with the arrows and press space.";

  const byHand = row(stage);
  const clear = () => {
    big.show(new Float32Array(64).fill(-1));
    drawn(big.image());
  };
  button(byHand, { label: "Clear", press: clear });
  slider(byHand, {
    label: "noise up to t\u00a0=", min: 20, max: 999, step: 1, value: noisiest,
    change(t) {
      noisiest = t;
      if (drawing) ask({});
      else status.textContent = `From t = ${t} the model would go on, once it is asked to.`;
    },
  });
  button(byHand, { label: "Go on from the drawing", press: goOn });

  const images = imagesOf(prepared);
  const half = images.length / 2;
  small.show(images.slice(0, half).map((x, k) => ({ x, image: images[half + k] })));
  big.show(images.at(-1));
  say("waiting", "Ask for a digit, or draw one.");
  if (auto && !still()) whenSeen(stage, () => stage.dataset.state === "waiting" && ask({}));
}

/** Ten buttons. */
function digitKeys(parent, ask) {
  const keys = row(parent);
  keys.classList.add("live-model-digits");
  keys.setAttribute("role", "group");
  keys.setAttribute("aria-label", "Digit that is asked for");
  for (let label = 0; label < 10; label++) {
    const key = button(keys, { label: String(label), press: () => ask({ label }) });
    key.dataset.class = label;
  }
  return keys;
}

/** Noise, and the way from it to a digit. */
function controls(parent, asked, ask) {
  const noise = row(parent);
  const seed = numberField(noise, "seed", asked.seed, (value) => ask({ seed: value }));
  const press = () => {
    seed.value = (asked.seed + 1) % (LARGEST_SEED + 1);
    ask({ seed: Number(seed.value) });
  };
  button(noise, { label: "Other noise", press });
  choice(noise, {
    label: "sampler",
    options: [["ddim", "DDIM"], ["ddpm", "ancestral"]],
    value: asked.method,
    change: (method) => ask({ method }),
  });
  const amounts = row(parent);
  slider(amounts, {
    label: "steps", min: 5, max: 50, step: 1, value: asked.steps,
    change: (steps) => ask({ steps }),
  });
  slider(amounts, {
    label: "guidance", min: 0, max: 6, step: 0.5, value: asked.guidance,
    format: (value) => value.toFixed(1),
    change: (guidance) => ask({ guidance }),
  });
}

function part(parent, kind, name) {
  const element = document.createElement(kind);
  element.className = name;
  parent.append(element);
  return element;
}

/** A field for a whole number. */
function numberField(parent, label, value, change) {
  const [, field] = named(parent, label, "input");
  Object.assign(field, { type: "number", min: 0, max: LARGEST_SEED, step: 1, value });
  const within = (number) => Math.max(0, Math.min(LARGEST_SEED, Math.floor(number || 0)));
  field.addEventListener("change", () => {
    field.value = within(field.valueAsNumber); // or it would show what is not used
    change(Number(field.value));
  });
  return field;
}

/** Once an element is in the window, and the page is loaded. */
function whenSeen(element, act) {
  new IntersectionObserver(([entry], observer) => {
    if (!entry.isIntersecting) return;
    observer.disconnect();
    if (document.readyState === "complete") act();
    else window.addEventListener("load", act, { once: true });
  }).observe(element);
}
