// The forward pass of DiffuSSM, in the letters of the chapters: B images of L = J M
// positions, J groups of M positions each, D channels. All arrays are flat.

import { convolve, gelu, linear, modulatedNorm, silu } from "./arrays.js";
import { readHalf } from "./half.js";

const FEATURES = 256; // numbers that stand for a timestep

/** Cosines, then sines, of t at 128 frequencies. */
export function timestepFeatures(t) {
  const half = FEATURES / 2;
  const features = new Float32Array(FEATURES);
  for (let i = 0; i < half; i++) {
    const angle = t * 10000 ** (-i / half);
    features[i] = Math.cos(angle);
    features[half + i] = Math.sin(angle);
  }
  return features;
}

export class Network {
  /** What `page_model.pack` wrote: sizes, and where each tensor lies in the numbers. */
  constructor(packed) {
    Object.assign(this, packed.sizes); // D, M, L, blocks, classes
    this.nullLabel = this.classes; // means "no class"
    const numbers = readHalf(packed.half);
    this.tensors = {};
    for (const [name, [start, size]] of Object.entries(packed.tensors)) {
      this.tensors[name] = numbers.subarray(start, start + size);
    }
  }

  /** A linear map, by its name. */
  map(name, x, rows) {
    const { [`${name}.weight`]: weight, [`${name}.bias`]: bias } = this.tensors;
    const y = new Float32Array(rows * bias.length);
    return linear(x, rows, weight, bias, y, weight.length / bias.length, bias.length);
  }

  /** x (B, L), one timestep t, labels (B) -> the predicted noise and v, (B, L) each. */
  forward(x, t, labels) {
    const B = labels.length;
    const rows = (B * this.L) / this.M; // B J
    const c = this.condition(t, labels); // (B, D)
    let stream = this.map("embed_x", x, rows); // (B, J, D)
    for (let block = 0; block < this.blocks; block++) {
      stream = this.block(`blocks.${block}`, stream, c, B);
    }
    const modulation = this.map("final_modulation", silu(c), B); // (B, 2D)
    const last = modulatedNorm(stream, modulation, this.D); // (B, J, D)
    const output = this.map("head", last, rows); // (B, J, M, 2)
    return {
      eps: Float32Array.from(x, (_, i) => output[2 * i]),
      v: Float32Array.from(x, (_, i) => output[2 * i + 1]),
    };
  }

  /** The embeddings of timestep and class, added: (B, D). */
  condition(t, labels) {
    const { D, tensors } = this;
    const hidden = silu(this.map("embed_t.0", timestepFeatures(t), 1));
    const time = this.map("embed_t.2", hidden, 1); // (D)
    const table = tensors["embed_y.weight"]; // (classes + 1, D)
    return Float32Array.from({ length: labels.length * D }, (_, i) => {
      const d = i % D;
      return time[d] + table[labels[(i - d) / D] * D + d];
    });
  }

  /** One step of the residual stream: (B, J, D) -> (B, J, D). */
  block(name, stream, c, B) {
    const { D, L, M } = this;
    const rows = (B * L) / M;
    const map = (part, x) => this.map(`${name}.${part}`, x, rows);
    const modulation = this.map(`${name}.modulation`, silu(c), B);
    const I = modulatedNorm(stream, modulation, D); // (B, J, D)
    const U = gelu(map("w_up", gelu(map("w0", I)))); // (B, J, M D), which is (B, L, D)
    const Y = this.mix(U, this.tensors[`${name}.kernels`], B); // (B, L, 2D)
    const shortened = gelu(this.down(name, Y, rows)); // I', (B, J, 2D)
    const gate = gelu(map("w1", I)); // (B, J, 2D)
    const gated = gelu(map("w2", shortened)).map((value, i) => value * gate[i]);
    return map("w3", gated).map((value, i) => value + stream[i]);
  }

  /**
   * The one place where positions meet: U (B, L, D), kernels (2, D, L) -> (B, L, 2D).
   * The second half of the channels is read from the end.
   */
  mix(U, kernels, B) {
    const { D, L } = this;
    const Y = new Float32Array(2 * U.length);
    const u = new Float32Array(3 + L);
    const y = new Float32Array(L);
    for (let channel = 0; channel < 2 * D; channel++) {
      const kernel = kernels.subarray(channel * L, (channel + 1) * L);
      const d = channel % D;
      const [first, step] = channel < D ? [0, 1] : [L - 1, -1];
      for (let b = 0; b < B; b++) {
        const start = b * L + first;
        for (let i = 0; i < L; i++) u[3 + i] = U[(start + step * i) * D + d];
        convolve(u, kernel, y);
        for (let i = 0; i < L; i++) Y[(start + step * i) * 2 * D + channel] = y[i];
      }
    }
    return Y;
  }

  /** Map k for place k of each group: Y (B, J, M, 2D) -> (B, J, M, 2D / M). */
  down(name, Y, rows) {
    const width = 2 * this.D;
    const part = width / this.M;
    const weight = this.tensors[`${name}.w_down.weight`]; // (M, 2D / M, 2D)
    const bias = this.tensors[`${name}.w_down.bias`]; // (M, 2D / M)
    const y = new Float32Array(rows * width);
    for (let k = 0; k < this.M; k++) {
      const places = Y.subarray(k * width);
      const weightOfPlace = weight.subarray(k * part * width, (k + 1) * part * width);
      const biasOfPlace = bias.subarray(k * part, (k + 1) * part);
      const out = y.subarray(k * part);
      linear(places, rows, weightOfPlace, biasOfPlace, out, this.M * width, width);
    }
    return y;
  }
}
