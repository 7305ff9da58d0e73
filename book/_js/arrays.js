// Arithmetic on flat arrays: what takes the time when a network runs in a page.

/**
 * y = W x + b for each row: x (rows, I), weight (O, I), bias (O) -> (rows, O), O a
 * multiple of four. Two rows by four outputs are summed at once: six numbers are read
 * for eight products, and the eight sums stay in registers. Rows need not lie side by
 * side: xStride and yStride are the steps from one to the next.
 */
export function linear(x, rows, weight, bias, y, xStride, yStride) {
  const O = bias.length;
  const I = weight.length / O;
  for (let r = 0; r < rows; r += 2) {
    const next = Math.min(r + 1, rows - 1); // a last row that is alone is done twice
    const x0 = r * xStride;
    const x1 = next * xStride;
    for (let o = 0; o < O; o += 4) {
      const w0 = o * I;
      const w1 = w0 + I;
      const w2 = w1 + I;
      const w3 = w2 + I;
      let a0 = bias[o];
      let a1 = bias[o + 1];
      let a2 = bias[o + 2];
      let a3 = bias[o + 3];
      let b0 = a0;
      let b1 = a1;
      let b2 = a2;
      let b3 = a3;
      for (let i = 0; i < I; i++) {
        const a = x[x0 + i];
        const b = x[x1 + i];
        const v0 = weight[w0 + i];
        const v1 = weight[w1 + i];
        const v2 = weight[w2 + i];
        const v3 = weight[w3 + i];
        a0 += a * v0;
        a1 += a * v1;
        a2 += a * v2;
        a3 += a * v3;
        b0 += b * v0;
        b1 += b * v1;
        b2 += b * v2;
        b3 += b * v3;
      }
      const y0 = r * yStride + o;
      const y1 = next * yStride + o;
      y[y0] = a0;
      y[y0 + 1] = a1;
      y[y0 + 2] = a2;
      y[y0 + 3] = a3;
      y[y1] = b0;
      y[y1 + 1] = b1;
      y[y1 + 2] = b2;
      y[y1 + 3] = b3;
    }
  }
  return y;
}

/**
 * The causal convolution y_i = sum over l <= i of k_l u_{i-l}, that is, a product with a
 * triangular Toeplitz matrix: u (3 + L) begins with three zeros, k (L) -> y (L), L a
 * multiple of four. Four outputs share what is read: one k and one u for four products.
 */
export function convolve(u, k, y) {
  const L = k.length;
  for (let i = 0; i < L; i += 4) {
    let y0 = 0;
    let y1 = 0;
    let y2 = 0;
    let y3 = 0;
    let u1 = u[i + 4];
    let u2 = u[i + 5];
    let u3 = u[i + 6];
    for (let l = 0; l < i + 4; l++) {
      const u0 = u[i + 3 - l];
      const weight = k[l];
      y0 += weight * u0;
      y1 += weight * u1;
      y2 += weight * u2;
      y3 += weight * u3;
      u3 = u2;
      u2 = u1;
      u1 = u0;
    }
    y[i] = y0;
    y[i + 1] = y1;
    y[i + 2] = y2;
    y[i + 3] = y3;
  }
  return y;
}

/** The error function to 1.5e-7 (Abramowitz and Stegun, formula 7.1.26). */
export function erf(x) {
  const z = Math.abs(x);
  const t = 1 / (1 + 0.3275911 * z);
  const p = 1.061405429 * t - 1.453152027;
  const q = (((p * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const y = 1 - q * Math.exp(-z * z);
  return x < 0 ? -y : y;
}

/** GELU, in place. */
export function gelu(x) {
  for (let i = 0; i < x.length; i++) {
    x[i] *= 0.5 * (1 + erf(x[i] * Math.SQRT1_2));
  }
  return x;
}

/** SiLU: a new array. */
export function silu(x) {
  return x.map((z) => z / (1 + Math.exp(-z)));
}

/**
 * Each row (D) to mean 0 and variance 1, then times 1 + scale, plus shift: x (B J, D),
 * modulation (B, 2D), the shifts first -> (B J, D).
 */
export function modulatedNorm(x, modulation, D) {
  const y = new Float32Array(x.length);
  const rowsOfImage = x.length / (modulation.length / 2); // J
  for (let r = 0; r < x.length / D; r++) {
    const row = x.subarray(r * D, (r + 1) * D);
    const mean = row.reduce((sum, value) => sum + value, 0) / D;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / D;
    const factor = 1 / Math.sqrt(variance + 1e-6);
    const shift = Math.floor(r / rowsOfImage) * 2 * D;
    for (let d = 0; d < D; d++) {
      const scale = 1 + modulation[shift + D + d];
      y[r * D + d] = (row[d] - mean) * factor * scale + modulation[shift + d];
    }
  }
  return y;
}
