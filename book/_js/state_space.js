// The formulas of the state spaces, in their pages' letters; a complex number is [a, b].

function over([a, b], [c, d]) {
  const size = c * c + d * d;
  return [(a * c + b * d) / size, (b * c - a * d) / size];
}

function exp([a, b]) {
  return [Math.exp(a) * Math.cos(b), Math.exp(a) * Math.sin(b)];
}

/** exp(z) - 1, accurate near 0: eq-state-space-expm1. */
function expm1([a, b]) {
  const real = Math.expm1(a) * Math.cos(b) - 2 * Math.sin(b / 2) ** 2;
  return [real, Math.exp(a) * Math.sin(b)];
}

/** [dA, dB] of a step with B = 1: eq-state-space-zoh, eq-state-space-bilinear. */
export function discretize(rule, A, dt) {
  const [a, b] = [dt * A[0], dt * A[1]];
  if (rule === "bilinear") {
    const below = [1 - a / 2, -b / 2];
    return [over([1 + a / 2, b / 2], below), over([dt, 0], below)];
  }
  return [exp([a, b]), a || b ? over(expm1([a, b]), A) : [dt, 0]];
}

/** The kernel K_l = 2 Re(dA^l dB) of one pair, with C = 1: eq-convolution-vandermonde. */
export function kernel(dA, dB, length) {
  const K = new Float64Array(length);
  let [a, b] = dB;
  for (let l = 0; l < length; l++) {
    K[l] = 2 * a;
    [a, b] = [dA[0] * a - dA[1] * b, dA[0] * b + dA[1] * a];
  }
  return K;
}
