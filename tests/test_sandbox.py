"""The painted distributions: score, samplers and the little network against Python."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stages import bundle, drawn, picture, stroke
from torch import Tensor

from diffussm.diffusion import GaussianDiffusion
from diffussm.reverse_process import ddim_step
from tools.book import ROOT

pytestmark = pytest.mark.end_to_end

CHAIN = GaussianDiffusion.linear(1000)
BLOBS = [
    {"x": 1.0, "y": 0.3, "weight": 1.0, "group": 0},
    {"x": -0.4, "y": -1.2, "weight": 3.0, "group": 1},
    {"x": 0.2, "y": 1.1, "weight": 0.5, "group": 1},
]
SPREAD = 0.3
GIVEN: dict[str, Any] = {
    "method": "ddim",
    "steps": 20,
    "w": 0,
    "centres": [[1, 0], [-1, 0]],
    "weights": [0.5, 0.5],
    "groups": [0, 1],
    "spread": 0.3,
}


@pytest.fixture
def script(tmp_path: Path, browser: Any) -> Callable[..., Any]:
    """What a function body in JavaScript returns, with the names of both modules."""

    def run(body: str, **given: Any) -> Any:
        folder = tmp_path / "modules"
        shutil.copytree(ROOT / "book" / "_js", folder, dirs_exist_ok=True)
        (folder / "main.js").write_text(
            "import { chain, drawPoints, exactNoise, levels, random, timesteps }"
            ' from "./mixture.js";\n'
            "import { lossAndGradients, makeNetwork, trainer }"
            ' from "./perceptron.js";\n'
            f"const given = {json.dumps(given)};\n"
            f"const found = () => {{ {body} }};\n"
            "export function start() { window.found = found(); }\n"
        )
        tab = browser.new_page()
        plain = "(_, v) => (ArrayBuffer.isView(v) ? [...v] : v)"
        text = tab.evaluate(f"{bundle(folder)}; JSON.stringify(window.found, {plain})")
        tab.close()
        return json.loads(text)

    return run


def log_density(x: Tensor, level: float) -> Tensor:
    """Of noisy points (B, 2), up to a constant."""
    numbers = [[blob["x"], blob["y"], blob["weight"]] for blob in BLOBS]
    centres, shares = torch.tensor(numbers, dtype=torch.float64).split([2, 1], dim=1)
    squares = ((x[:, None] - math.sqrt(level) * centres) ** 2).sum(2)
    V = level * SPREAD**2 + 1 - level
    return torch.logsumexp(shares[:, 0].log() - squares / (2 * V), dim=1)


def noise(x: Tensor, level: float) -> Tensor:
    """The answer of a perfect network, by autograd: (B, 2) -> (B, 2)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(log_density(x, level).sum(), x)
    return -math.sqrt(1 - level) * score


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The same as a model of the package, (B, 2, 1, 1) -> (B, 4, 1, 1)."""
    eps = noise(x.flatten(1), CHAIN.alphas_cumprod[int(t[0])].item())
    return torch.cat([eps, 0 * eps], dim=1)[:, :, None, None]


def test_levels_are_those_of_the_package(script: Any) -> None:
    counts = [5, 20, 55, 250]
    found = script(
        "return [levels(), given.counts.map((n) => timesteps(n))];", counts=counts
    )
    np.testing.assert_allclose(found[0], CHAIN.alphas_cumprod, rtol=1e-12)
    assert found[1] == [CHAIN.respace(n).timestep_map.tolist() for n in counts]


def test_exact_noise_is_the_slope_of_the_density(script: Any) -> None:
    x = torch.randn(20, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    for level in (0.999, 0.7, 0.01):
        found = script(
            """
            const { x, level, blobs } = given;
            return x.map((point) => exactNoise(blobs, 0.3, ...point, level));
            """,
            x=x.tolist(),
            level=level,
            blobs=BLOBS,
        )
        np.testing.assert_allclose(found, noise(x, level), rtol=1e-9, atol=1e-12)


WALK = """
  const exact = (x, y, level) => exactNoise(given.blobs, 0.3, x, y, level);
  return [...chain(given.start, exact, given)].pop();
"""


def test_ddim_is_that_of_the_package(script: Any) -> None:
    start = torch.randn(20, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    how = {"method": "ddim", "steps": 20, "blobs": BLOBS}
    found = script(WALK, start=start.flatten().tolist(), **how)
    x, shorter = start[:, :, None, None], CHAIN.respace(20)
    for step in reversed(range(20)):
        x, _ = ddim_step(network, shorter, x, step)
    np.testing.assert_allclose(found, x.flatten(), rtol=1e-6, atol=1e-6)


def test_heun_is_of_second_order(script: Any) -> None:
    start = torch.randn(20, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    start = start.flatten().tolist()
    ends = {
        (method, n): np.array(
            script(WALK, start=start, method=method, steps=n, blobs=BLOBS)
        )
        for method, n in [("ddim", 60), ("heun", 60), ("heun", 240), ("ddim", 960)]
    }
    truth = ends["heun", 240]
    assert np.abs(ends["ddim", 960] - truth).max() < 0.05  # the same flow
    errors = {m: np.abs(ends[m, 60] - truth).mean() for m in ("ddim", "heun")}
    assert 5 * errors["heun"] < errors["ddim"]


def test_one_gaussian_comes_out_as_it_is(script: Any) -> None:
    found = script(
        """
        const one = [{ x: 0.5, y: -0.2, weight: 1, group: 0 }];
        const exact = (x, y, level) => exactNoise(one, 0.4, x, y, level);
        const unit = [{ x: 0, y: 0, weight: 1, group: 0 }];
        const start = drawPoints(unit, 1, 4000, random(1)).points;
        const end = (method) => [...chain(start, exact, { method, steps: 200 })].pop();
        return [start, end("ancestral"), end("ddim"), end("heun")];
        """
    )
    start, *ends = (np.array(points).reshape(-1, 2) for points in found)
    assert np.abs(start.mean(0)).max() < 5 / math.sqrt(4000)
    np.testing.assert_allclose(start.std(0), 1, atol=5 / math.sqrt(8000))
    for end in ends:
        se = 0.4 / math.sqrt(4000)
        np.testing.assert_allclose(end.mean(0), [0.5, -0.2], atol=5 * se + 0.01)
        np.testing.assert_allclose(end.std(0), 0.4, rtol=0.05 + 5 / math.sqrt(8000))
    # without fresh noise each point keeps its quantile (ch. "The reverse process")
    a, V = math.sqrt(CHAIN.alphas_cumprod[-1]), CHAIN.alphas_cumprod[-1].item()
    centre = np.array([0.5, -0.2])
    wanted = centre + 0.4 * (start - a * centre) / math.sqrt(V * 0.16 + 1 - V)
    np.testing.assert_allclose(ends[2], wanted, atol=0.01)


def test_the_gradient_is_that_of_finite_differences(script: Any) -> None:
    found = script(
        """
        const source = random(3);
        const network = makeNetwork(source);
        const numbers = (n) => Array.from({ length: n }, source.normal);
        const examples = Array.from({ length: 5 }, () => (
          { input: numbers(7), wanted: numbers(2) }));
        const { gradients } = lossAndGradients(network, examples);
        const pairs = [];
        let count = 0;
        network.forEach((layer, l) => {
          for (const part of ["weight", "bias"]) {
            count += layer[part].length;
            for (const i of [0, 1, layer[part].length - 1]) {
              const before = layer[part][i];
              const loss = [1e-5, -1e-5].map((change) => {
                layer[part][i] = before + change;
                return lossAndGradients(network, examples).loss;
              });
              layer[part][i] = before;
              pairs.push([gradients[l][part][i], (loss[0] - loss[1]) / 2e-5]);
            }
          }
        });
        return [pairs, count];
        """
    )
    by_hand, by_difference = np.array(found[0]).T
    np.testing.assert_allclose(by_hand, by_difference, rtol=1e-4, atol=1e-8)
    assert np.abs(by_hand).min() > 1e-6 and found[1] == 842  # as the chapter says


def test_training_lowers_the_loss(script: Any) -> None:
    before, after, losses = script(
        """
        const source = random(4);
        const sample = drawPoints(given.blobs, 0.3, 500, source);
        const pupil = trainer(sample, levels(), source, { steps: 300 });
        const far = () => [[0, 0], [1, 1], [-1, 0], [0, -1]].map(([x, y]) => {
          const exact = exactNoise(given.blobs, 0.3, x, y, 0.5);
          const answer = pupil.noise(null)(x, y, 0.5);
          return Math.hypot(answer[0] - exact[0], answer[1] - exact[1]);
        });
        const before = far();
        const losses = Array.from({ length: 300 }, () => pupil.step());
        return [before, far(), losses];
        """,
        blobs=BLOBS,
    )
    assert np.mean(losses[-50:]) < 0.8 * np.mean(losses[:10])
    assert np.mean(after) < 0.5 * np.mean(before)


def test_it_is_painted_and_trained(opened: Any) -> None:
    tab = opened("sandbox", GIVEN)
    tab.emulate_media(reduced_motion="reduce")
    tab.reload()
    tab.wait_for_function("document.querySelector('canvas').height > 100")
    tab.wait_for_timeout(300)
    way = tab.get_by_label("way to data")
    assert way.input_value() == "1", "it moves although less motion was asked for"
    seen = [picture(tab)]

    def changed() -> bool:
        tab.wait_for_timeout(300)
        seen.append(picture(tab))
        return seen[-1] not in seen[:-1]

    tab.get_by_role("button", name="ring").press("Enter")
    assert changed()
    tab.get_by_label("guidance").press("End")
    assert changed()
    tab.get_by_label("sampler").select_option("ancestral")
    assert changed()
    way.press("Home")
    assert changed()
    tab.get_by_role("button", name="erase").click()
    assert changed()
    tab.locator("canvas").first.click(position={"x": 150, "y": 100})
    assert changed()
    tab.get_by_role("button", name="train").click()
    said = tab.get_by_role("status")
    said.filter(has_text="done 4000 of 4000 steps").wait_for()


def test_the_keyboard_paints(opened: Any) -> None:
    tab = opened("sandbox", GIVEN)
    tab.emulate_media(reduced_motion="reduce")
    tab.reload()
    tab.wait_for_function("document.querySelector('canvas').height > 100")
    tab.get_by_role("button", name="erase").press("Enter")
    said, paper = tab.locator(".explorable-says"), tab.locator("canvas").first
    paper.focus()
    drawn(tab)
    before = picture(tab)
    for key in ("ArrowLeft", "ArrowUp"):
        tab.keyboard.press(key)
    assert "0 clusters; the pen is up" in said.inner_text()
    for key in ("Space", *8 * ["ArrowLeft"], "Space"):
        tab.keyboard.press(key)
    painted = int(said.inner_text().split(": ")[1].split()[0])
    assert 1 < painted < 9, "a stroke leaves clusters a little apart"
    for key in (*5 * ["ArrowDown"], "Space", "Space"):
        tab.keyboard.press(key)
    assert f"{painted + 1} clusters; the pen is up" in said.inner_text()
    tab.get_by_role("button", name="play").focus()  # the cross is gone
    drawn(tab)
    assert picture(tab) != before


def test_a_finger_paints_downwards_on_one_panel_and_scrolls_on_the_other(
    opened: Any,
) -> None:
    tab = opened("sandbox", GIVEN, has_touch=True, reduced_motion="reduce")
    tab.evaluate("document.body.style.paddingBottom = '2000px'")
    tab.wait_for_function("document.querySelector('canvas').height > 100")
    tab.get_by_role("button", name="erase").click()
    drawn(tab)
    empty = picture(tab)
    stroke(tab, 0, (150, 250), (150, 80))
    drawn(tab)
    painted = picture(tab)
    assert painted != empty and tab.evaluate("scrollY") == 0
    stroke(tab, 1, (150, 250), (150, 80))
    drawn(tab)
    assert picture(tab) == painted and tab.evaluate("scrollY") > 50
