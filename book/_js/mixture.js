// A mixture of Gaussians in the plane: its exact noise at any level, and samplers (ch. "Score
// and flow"). A level is alpha-bar, 1 for clean and near 0 for pure noise.

/** alpha-bar of the linear schedule with a thousand steps. */
export function levels() {
  const table = new Float64Array(1000);
  let product = 1;
  for (let t = 0; t < 1000; t++) {
    product *= 1 - (1e-4 + ((0.02 - 1e-4) * t) / 999);
    table[t] = product;
  }
  return table;
}

/** The timesteps of a chain of n steps, equally spaced with both ends (eq-sampling-respace). */
export function timesteps(n) {
  return Array.from({ length: n }, (_, i) => {
    const place = (999 * i) / (n - 1);
    const near = Math.round(place);
    return near - place === 0.5 && near % 2 ? near - 1 : near; // halves to even, as Python
  });
}

/**
 * E[epsilon | x] at a level, eq-sampling-mixture: [epsilon_1, epsilon_2]. The blobs
 * {x, y, weight} have all the same spread.
 */
export function exactNoise(blobs, spread, x, y, level) {
  const a = Math.sqrt(level);
  const b = Math.sqrt(1 - level);
  const V = level * spread ** 2 + 1 - level;
  const logits = blobs.map(
    (blob) => Math.log(blob.weight) - ((x - a * blob.x) ** 2 + (y - a * blob.y) ** 2) / (2 * V),
  );
  const top = Math.max(...logits);
  let [sum, meanX, meanY] = [0, 0, 0];
  blobs.forEach((blob, k) => {
    const r = Math.exp(logits[k] - top);
    sum += r;
    meanX += r * blob.x;
    meanY += r * blob.y;
  });
  return [(b / V) * (x - (a * meanX) / sum), (b / V) * (y - (a * meanY) / sum)];
}

/** eq-sampling-guidance: w times what the label changes. */
export function guided(without, withLabel, w) {
  if (w === 0) return without;
  if (w === 1) return withLabel;
  return (x, y, level) => {
    const [free, own] = [without(x, y, level), withLabel(x, y, level)];
    return [free[0] + w * (own[0] - free[0]), free[1] + w * (own[1] - free[1])];
  };
}

/** Random numbers: uniform ones of mulberry32, and standard normal ones by Box and Muller. */
export function random(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
  };
  const normal = () =>
    Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, normal };
}

/** Points (x, y, x, y, ...) of the mixture, with a group for each. */
export function drawPoints(blobs, spread, count, { uniform, normal }) {
  const total = blobs.reduce((sum, blob) => sum + blob.weight, 0);
  const points = new Float64Array(2 * count);
  const groups = new Uint8Array(count);
  for (let i = 0; i < count; i++) {
    let rest = uniform() * total;
    const blob = blobs.find((one) => (rest -= one.weight) < 0) ?? blobs[0];
    points[2 * i] = blob.x + spread * normal();
    points[2 * i + 1] = blob.y + spread * normal();
    groups[i] = blob.group;
  }
  return { points, groups };
}

/**
 * The states of a chain from noise to data, one by one, the start first. `noise(x, y, level)`
 * is what is predicted; `method` is "ancestral", "ddim" or "heun".
 */
export function* chain(start, noise, { method, steps, seed = 0 }) {
  const table = levels();
  const visited = [1, ...timesteps(steps).map((t) => table[t])];
  const { normal } = random(seed);
  let points = start;
  yield points;
  for (let i = steps; i > 0; i--) {
    const [now, after] = [visited[i], visited[i - 1]];
    const fresh = Math.sqrt(((1 - after) / (1 - now)) * (1 - now / after));
    const sigma = method === "ancestral" ? fresh : 0;
    const next = new Float64Array(points.length);
    for (let j = 0; j < points.length; j += 2) {
      const here = [points[j], points[j + 1]];
      let eps = noise(...here, now);
      if (method === "heun" && after < 1) { // eq-score-heun
        const there = here.map((x, k) => move(x, eps[k], now, after, 0));
        const second = noise(...there, after);
        eps = eps.map((first, k) => (first + second[k]) / 2);
      }
      for (const k of [0, 1]) {
        next[j + k] = move(here[k], eps[k], now, after, sigma);
        if (sigma > 0) next[j + k] += sigma * normal();
      }
    }
    points = next;
    yield points;
  }
}

/** eq-sampling-ddim without its fresh noise, for one coordinate. */
function move(x, eps, now, after, sigma) {
  const clean = (x - Math.sqrt(1 - now) * eps) / Math.sqrt(now);
  return Math.sqrt(after) * clean + Math.sqrt(Math.max(0, 1 - after - sigma ** 2)) * eps;
}
