// Random numbers that a seed decides.

/** Uniform numbers between 0 and 1: a counter that is scrambled ("mulberry32"). */
export function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Standard normal numbers: two from two uniform ones (Box and Muller). */
export function normals(seed) {
  const uniform = uniforms(seed);
  let kept = null;
  return () => {
    if (kept !== null) {
      const value = kept;
      kept = null;
      return value;
    }
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())); // never the log of 0
    const angle = 2 * Math.PI * uniform();
    kept = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  };
}

/** Standard normal noise (n). */
export function noiseOf(normal, n) {
  return Float32Array.from({ length: n }, normal);
}
