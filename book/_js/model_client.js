// The page's side of the model: it has a worker, and shows what the worker sends.

const GLIDE = 900; // milliseconds in which all steps are shown, if they come so quickly

/** A worker that has the weights; `hear` gets its messages, `lose` the error that ends it. */
async function employ(hear, lose) {
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
  const end = (message) => {
    worker.terminate();
    lose(new Error(message));
  };
  worker.onmessage = ({ data }) => hear(data);
  worker.onerror = ({ message }) => end(message ?? "the worker cannot start");
  const unreadable = () => end("an answer cannot be read");
  worker.addEventListener("messageerror", unreadable);
  worker.postMessage({ packed: globalThis.liveModel });
  return worker;
}

export class ModelClient {
  /** `show` gets each step, at a pace that an eye can follow; `fail` gets an error. */
  constructor(show, fail) {
    this.show = show;
    this.fail = fail;
    this.worker = null; // a promise, from the first request on
    this.latest = 0; // number of the request that counts
    this.waiting = []; // steps that have not been shown
    this.timer = null;
  }

  /** Draw something: what is asked for takes the place of what was. */
  async ask(request) {
    this.cancel();
    const id = this.latest;
    this.worker ??= employ((step) => this.hear(step), (error) => this.lose(error));
    try {
      const worker = await this.worker;
      if (id === this.latest) worker.postMessage({ ...request, id });
    } catch (error) {
      this.worker = null;
      if (id === this.latest) this.lose(error);
    }
  }

  /** The next request is for another worker. */
  lose(error) {
    this.worker = null;
    this.cancel();
    this.fail(error);
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
