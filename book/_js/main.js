// Every explorable of a page comes to life where its still picture stands.

import { bank } from "./bank.js";
import { bill } from "./bill.js";
import { block_cost } from "./block_cost.js";
import { convolution } from "./convolution.js";
import { eigenvalue } from "./eigenvalue.js";
import { growth } from "./growth.js";
import { liveModel } from "./live_model.js";
import { memory } from "./memory.js";
import { reach } from "./reach.js";
import { sandbox } from "./sandbox.js";
import { spring } from "./spring.js";

const EXPLORABLES = {
  bank,
  bill,
  block_cost,
  convolution,
  eigenvalue,
  growth,
  "live-model": liveModel,
  memory,
  reach,
  sandbox,
  spring,
};

/** Replace the still picture of each box by what its name stands for. */
export function start() {
  for (const box of document.querySelectorAll(".explorable[data-name]")) {
    const explorable = EXPLORABLES[box.dataset.name];
    if (!explorable) throw new Error(`no explorable ${box.dataset.name}`);
    const given = JSON.parse(box.querySelector("script").textContent);
    const stage = document.createElement("div");
    stage.className = "explorable-stage";
    box.append(stage);
    explorable(stage, given);
    box.querySelector(".explorable-still").classList.add("explorable-paper");
  }
}
