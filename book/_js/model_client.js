// The page's side of the model: it has a worker, and shows what the worker sends.

const GLIDE = 900; // milliseconds in which all steps are shown, if they come so quickly

/** A worker that has the weights; `hear` gets its messages. */
async function employ(hear) {
  const script = document.querySelector('script[src*="explorables.js"]');
  const weights = document.createElement("script");
  weights.src = new URL("live_model.js", script.src).href; // sets globalThis.liveModel
  await new Promise((resolve, reject) => {
    weights.onload = resolve;
    weights.onerror = () => reject(new Error(`${weights.src} is missing`));
    document.head.append(weights);
  });
  const text = `"use strict"; (${bundle})("model_worker");`; // a file may load no other
  const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  const worker = new Worker(address);
  worker.onmessage = ({ data }) => hear(data);
  worker.postMessage({ packed: globalThis.liveModel });
  return worker;
}

export class ModelClient {
  /** `show` is called with each step, at a pace that an eye can follow. */
  constructor(show) {
    this.show = show;
    this.worker = null; // a promise, from the first request on
    this.latest = 0; // number of the request that counts
    this.waiting = []; // steps that have not been shown
    this.timer = null;
  }

  /** Draw something: what is asked for takes the place of what was. */
  async ask(request) {
    this.cancel();
    const id = this.latest;
    this.worker ??= employ((step) => this.hear(step));
    const worker = await this.worker;
    if (id === this.latest) worker.postMessage({ ...request, id });
  }

  /** What is on its way is no longer wanted. */
  cancel() {
    this.latest += 1;
    this.waiting = [];
  }

  hear(step) {
    if (step.id !== this.latest) return;
    this.waiting.push(step);
    if (this.timer === null) this.next();
  }

  next() {
    const step = this.waiting.shift();
    this.timer = step ? setTimeout(() => this.next(), GLIDE / step.steps) : null;
    if (step) this.show(step);
  }
}
