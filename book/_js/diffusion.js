// From noise to images: schedule, respacing, guidance, and the two ways to step back.

import { noiseOf } from "./random.js";

const T = 1000; // noise levels in training

/** The share of the signal that is left at each timestep, for betas from 1e-4 to 0.02. */
export function alphasCumprod() {
  let product = 1;
  return Float64Array.from({ length: T }, (_, t) => {
    product *= 1 - (1e-4 + ((0.02 - 1e-4) * t) / (T - 1));
    return product;
  });
}

/** To the nearest integer; from the middle between two to the even one, as torch does. */
function roundHalfToEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** A chain of some steps through equally spaced timesteps, from 0 up to the noisiest. */
export class Chain {
  constructor(steps, noisiest = T - 1) {
    const all = alphasCumprod();
    this.steps = Math.min(steps, noisiest + 1);
    const apart = noisiest / Math.max(this.steps - 1, 1);
    this.timesteps = Array.from({ length: this.steps }, (_, s) => {
      const back = this.steps - 1 - s; // from the noisiest, the only one of one
      const fromThere = back < Math.floor(this.steps / 2) || this.steps === 1;
      return roundHalfToEven(fromThere ? noisiest - apart * back : apart * s);
    });
    this.after = this.timesteps.map((t) => all[t]); // alpha-bar of each step
    this.before = [1, ...this.after.slice(0, -1)]; // and of the one below
    this.betas = this.after.map((after, s) => 1 - after / this.before[s]);
  }

  /** x_t given x_0, at the noisiest step. */
  noised(image, noise) {
    const alphaBar = this.after[this.steps - 1];
    const [signal, spread] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
    return image.map((value, i) => signal * value + spread * noise[i]);
  }

  /** x_0 as the noise implies it, clipped to [-1, 1], and the noise that it implies. */
  believed(x, eps, step) {
    const signal = Math.sqrt(this.after[step]);
    const spread = Math.sqrt(1 - this.after[step]);
    const image = x.map((value, i) => {
      return Math.max(-1, Math.min(1, (value - spread * eps[i]) / signal));
    });
    const noise = x.map((value, i) => (value - signal * image[i]) / spread);
    return { image, noise };
  }

  /** DDIM: the noise of this level is replaced by less of the same noise. */
  ddimStep(x, output, step) {
    const { image, noise } = this.believed(x, output.eps, step);
    const signal = Math.sqrt(this.before[step]);
    const spread = Math.sqrt(1 - this.before[step]);
    return { x: image.map((value, i) => signal * value + spread * noise[i]), image };
  }

  /** The logarithm of beta-tilde; at step 0, where it is minus infinity, that of step 1. */
  posteriorLogVariance(step) {
    const s = Math.max(step, Math.min(1, this.steps - 1));
    if (s === 0) return Math.log(this.betas[0]);
    return Math.log((this.betas[s] * (1 - this.before[s])) / (1 - this.after[s]));
  }

  /** Ancestral: draw from p(x_{t-1} | x_t), with the variance that v chose. */
  ancestralStep(x, output, step, normal) {
    const { image } = this.believed(x, output.eps, step);
    const [before, after, beta] = [this.before[step], this.after[step], this.betas[step]];
    const ofImage = (beta * Math.sqrt(before)) / (1 - after);
    const ofX = ((1 - before) * Math.sqrt(1 - beta)) / (1 - after);
    const mean = x.map((value, i) => ofImage * image[i] + ofX * value);
    if (step === 0) return { x: mean, image }; // noise on it would only be seen
    const largest = Math.log(beta);
    const smallest = this.posteriorLogVariance(step);
    const noise = noiseOf(normal, x.length);
    const next = mean.map((value, i) => {
      const share = (output.v[i] + 1) / 2;
      const logVariance = share * largest + (1 - share) * smallest;
      return value + Math.exp(0.5 * logVariance) * noise[i];
    });
    return { x: next, image };
  }
}

/**
 * What the network says of x (L), with what the label changes exaggerated w times. Both
 * questions, with the label and without, are one batch of two.
 */
export function guided(network, x, t, label, w) {
  if (w === 1) return network.forward(x, t, [label]);
  const both = new Float32Array(2 * x.length);
  both.set(x);
  both.set(x, x.length);
  const { eps, v } = network.forward(both, t, [label, network.nullLabel]);
  const without = eps.subarray(x.length);
  return {
    eps: without.map((value, i) => value + w * (eps[i] - value)),
    v: v.subarray(0, x.length),
  };
}

/**
 * Walk from x at the noisiest step of a chain to an image. Yields the timestep, x before
 * the step and after it, and the image that the network predicts.
 */
export function* denoise(network, chain, x, { label, guidance, method, normal }) {
  for (let step = chain.steps - 1; step >= 0; step--) {
    const t = chain.timesteps[step];
    const output = guided(network, x, t, label, guidance);
    const next =
      method === "ddim"
        ? chain.ddimStep(x, output, step)
        : chain.ancestralStep(x, output, step, normal);
    yield { t, before: x, ...next };
    x = next.x;
  }
}
