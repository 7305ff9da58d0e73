// A small network that learns which noise is in a point of the plane, with its backward pass
// by hand and Adam (ch. "Score and flow"). What it puts out is v (ch. "Targets"): the noise
// is b x + a v, so it starts from b x, the answer for data that are noise themselves.

const WIDTH = 24;
const INPUTS = 7; // the point, three features of the level, two of the label
const SIZES = [[INPUTS, WIDTH], [WIDTH, WIDTH], [WIDTH, 2]];

/** Three layers, weights (outputs x inputs) and bias in one array each. */
export function makeNetwork({ normal }) {
  return SIZES.map(([inputs, outputs]) => ({
    inputs,
    outputs,
    weight: Float64Array.from({ length: inputs * outputs }, () => normal() / Math.sqrt(inputs)),
    bias: new Float64Array(outputs),
  }));
}

/** What the network is told: x, y, the level, and the label as one of two (or of none). */
export function features(x, y, level, group) {
  const [a, b] = [Math.sqrt(level), Math.sqrt(1 - level)];
  const label = [Number(group === 0), Number(group === 1)];
  return Float64Array.of(x, y, a, b, Math.log(b / a) / 2, ...label);
}

/** The input and every layer's output, the last of which is the answer. */
export function forward(network, input) {
  const values = [input];
  for (let l = 0; l < network.length; l++) {
    const { inputs, outputs, weight, bias } = network[l];
    const u = values[l];
    const y = new Float64Array(outputs);
    for (let o = 0, at = 0; o < outputs; o++) {
      let sum = bias[o];
      for (let i = 0; i < inputs; i++) sum += weight[at++] * u[i];
      y[o] = l < network.length - 1 ? Math.tanh(sum) : sum;
    }
    values.push(y);
  }
  return values;
}

/** Add to `gradients` those of scale * |answer - wanted|^2, layer by layer from the end. */
export function backward(network, values, wanted, scale, gradients) {
  const answer = values[network.length];
  let dy = answer.map((v, k) => 2 * scale * (v - wanted[k]));
  for (let l = network.length - 1; l >= 0; l--) {
    const { inputs, outputs, weight } = network[l];
    const { weight: dw, bias: db } = gradients[l];
    const u = values[l];
    const du = new Float64Array(inputs);
    for (let o = 0, at = 0; o < outputs; o++) {
      db[o] += dy[o];
      for (let i = 0; i < inputs; i++, at++) {
        dw[at] += dy[o] * u[i];
        du[i] += dy[o] * weight[at];
      }
    }
    for (let i = 0; i < inputs; i++) du[i] *= 1 - u[i] ** 2; // of tanh; not used for l = 0
    dy = du;
  }
}

/** Mean loss of some examples {input, wanted}, and its gradients. */
export function lossAndGradients(network, examples) {
  const gradients = network.map(({ weight, bias }) => ({
    weight: new Float64Array(weight.length), bias: new Float64Array(bias.length),
  }));
  let loss = 0;
  const scale = 1 / (2 * examples.length); // the mean of both coordinates of all examples
  for (const { input, wanted } of examples) {
    const values = forward(network, input);
    const answer = values[network.length];
    loss += scale * ((answer[0] - wanted[0]) ** 2 + (answer[1] - wanted[1]) ** 2);
    backward(network, values, wanted, scale, gradients);
  }
  return { loss, gradients };
}

/** Adam with a rate that falls to zero; `step(gradients)` moves the weights. */
export function adam(network, { rate, steps }) {
  const zeros = () => network.map(({ weight, bias }) => ({
    weight: new Float64Array(weight.length), bias: new Float64Array(bias.length),
  }));
  const [first, second] = [zeros(), zeros()];
  let count = 0;
  return (gradients) => {
    count++;
    const stride = rate * (1 - count / (steps + 1));
    network.forEach((layer, l) => {
      for (const part of ["weight", "bias"]) {
        const [p, g] = [layer[part], gradients[l][part]];
        const [m, v] = [first[l][part], second[l][part]];
        for (let i = 0; i < p.length; i++) {
          m[i] = 0.9 * m[i] + 0.1 * g[i];
          v[i] = 0.99 * v[i] + 0.01 * g[i] ** 2;
          const size = Math.sqrt(v[i] / (1 - 0.99 ** count)) + 1e-8;
          p[i] -= (stride * (m[i] / (1 - 0.9 ** count))) / size;
        }
      }
    });
  };
}

/** A network in training on points with groups: `step()` takes a batch, returns its loss. */
export function trainer({ points, groups }, table, source, { steps, batch = 32 }) {
  const { uniform, normal } = source;
  const network = makeNetwork(source);
  const move = adam(network, { rate: 0.01, steps });
  const example = () => {
    const i = Math.floor(uniform() * groups.length);
    const level = table[Math.floor(uniform() ** 2 * table.length)]; // little noise more often
    const [a, b] = [Math.sqrt(level), Math.sqrt(1 - level)];
    const noise = [normal(), normal()];
    const noisy = noise.map((eps, k) => a * points[2 * i + k] + b * eps);
    const group = uniform() < 0.3 ? null : groups[i]; // no label now and then, for guidance
    const wanted = noise.map((eps, k) => a * eps - b * points[2 * i + k]);
    return { input: features(...noisy, level, group), wanted };
  };
  const step = () => {
    const examples = Array.from({ length: batch }, example);
    const { loss, gradients } = lossAndGradients(network, examples);
    move(gradients);
    return loss;
  };
  const noise = (group) => (x, y, level) => {
    const [a, b] = [Math.sqrt(level), Math.sqrt(1 - level)];
    const v = forward(network, features(x, y, level, group))[network.length];
    return [b * x + a * v[0], b * y + a * v[1]];
  };
  return { network, step, noise };
}
