// The model beside the page: a worker gets the weights once, then requests.

import { Chain, denoise } from "./diffusion.js";
import { Network } from "./network.js";
import { noiseOf, normals } from "./random.js";

/** Let messages in that have arrived meanwhile. */
function nextTask() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

/**
 * Where a request begins: with noise, or with an image and noise. Always typed: once the
 * loops of the network have met a plain array, they are slow for all that come later.
 */
function beginning(request, size) {
  const normal = normals(request.seed);
  const noise = Float32Array.from(request.noise ?? noiseOf(normal, size));
  const chain = new Chain(request.steps, request.noisiest);
  const x = request.image
    ? chain.noised(Float32Array.from(request.image), noise)
    : noise;
  return { chain, x, normal };
}

/**
 * Requests come as {id, label, seed, steps, guidance, method}, with `image` and
 * `noisiest` where an image is gone on from. Each step goes back, with what `denoise`
 * says, how many were `taken` before, out of how many `steps`, and whether it is the
 * `last`. A new request ends the one before it.
 */
export function start() {
  let network = null;
  let current = null;

  const draw = async (request) => {
    const { id } = request;
    current = id;
    const { chain, x, normal } = beginning(request, network.L);
    const { steps } = chain;
    let taken = 0;
    for (const step of denoise(network, chain, x, { ...request, normal })) {
      self.postMessage({ id, taken, steps, last: taken === steps - 1, ...step });
      await nextTask();
      if (id !== current) return;
      taken += 1;
    }
  };

  self.onmessage = ({ data }) => {
    if (data.packed) network = new Network(data.packed);
    else draw(data).catch(reportError); // or nobody would hear of it
  };
}
