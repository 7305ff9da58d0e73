"""The model in the page computes what PyTorch does, and answers mouse and keyboard.

A small page of its own stands for those of the book: the same scripts, the weights of
the package. The rendered pages have the weights that their chapter has trained; what
they draw is compared with PyTorch on these. Pages are opened as files and over a server
on this machine.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browsers import absent, serving
from sphinx.errors import ExtensionError
from visits import the_book, the_server  # noqa: F401 (the fixtures)

from benchmarks.page_model import recognised
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM
from diffussm.options import RECIPES
from diffussm.pretrained import load_pretrained
from diffussm.reverse_process import ancestral_step
from diffussm.sampling import denoise, guided, sample
from tools.book import ROOT, is_quick

sys.path.insert(0, str(ROOT / "book"))
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import page_model
from explorables import bundle
from live_model import CHAPTER, FRONT, GLUED, box, follow, script, trained
from page_model import computing_with, for_page, numbers, pack, rounded, unpack

PROBE = """\
import { Chain, denoise } from "./diffusion.js";
import { Network } from "./network.js";
import { erf } from "./arrays.js";
import { readHalf } from "./half.js";
import { noiseOf, normals } from "./random.js";
import { shownSteps } from "./pixels.js";

export function start() {
  globalThis.probe = {
    Chain, Network, denoise, erf, noiseOf, normals, readHalf, shownSteps,
  };
}
"""
DIFFUSION = GaussianDiffusion.linear()


@pytest.fixture(scope="module")
def model() -> DiffuSSM:
    return load_pretrained("digits").model().eval()


@pytest.fixture(scope="module")
def halved(model: DiffuSSM) -> DiffuSSM:
    return rounded(model)


@pytest.fixture(scope="module")
def site(model: DiffuSSM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts, the weights, and a page with nothing else."""
    folder = tmp_path_factory.mktemp("site")
    modules = folder / "modules"
    modules.mkdir()
    for file in (ROOT / "book" / "_js").glob("*.js"):
        (modules / file.name).write_text(file.read_text("utf-8"), encoding="utf-8")
    (modules / "probe.js").write_text(PROBE)
    (folder / "explorables.js").write_text(bundle(modules), encoding="utf-8")
    styles = (ROOT / "book" / "_static" / "book.css").read_text("utf-8")
    shown = for_page(model, DIFFUSION)
    (folder / "live_model.js").write_text(script(shown["packed"]))
    for name, auto in (("auto", True), ("quiet", False)):
        (folder / f"{name}.html").write_text(
            '<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8">'
            "<title>A digit</title>"
            f'<link rel="icon" href="data:,"><style>{styles}</style>'
            '<script src="explorables.js" defer></script>'
            f"<main><h1>A digit</h1>{box(shown, auto=auto)}</main>"
        )
    return folder


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    with serving(site) as address:
        yield address


def opened(browser: Any, address: str, site: str = "", **options: Any) -> Any:
    """A tab that collects what it complains of, and requests to outside its site."""
    tab = browser.new_page(viewport={"width": 800, "height": 900}, **options)
    tab.complaints = []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    grave = ("error", "warning")  # the scripts of the theme also log what they do
    tab.on(
        "console",
        lambda m: tab.complaints.append(m.text) if not site or m.type in grave else 0,
    )
    here = (site or address.rpartition("/")[0], "data:", "blob:")
    tab.on(
        "request",
        lambda r: None if r.url.startswith(here) else tab.complaints.append(r.url),
    )
    tab.goto(address)
    return tab


@pytest.fixture(scope="module")
def probe(browser: Any, site: Path) -> Iterator[Any]:
    """A page in which the modules can be called from here."""
    tab = opened(browser, (site / "quiet.html").as_uri())
    tab.add_script_tag(path=str(site / "live_model.js"))
    tab.evaluate("bundle('probe'); globalThis.network = new probe.Network(liveModel);")
    yield tab
    assert tab.complaints == []
    tab.close()


@pytest.fixture(scope="module")
def ten(model: DiffuSSM) -> torch.Tensor:
    """A digit of each class, (10, 1, 8, 8)."""
    how = {"cfg_scale": 1.5, "clip_denoised": True, "progress": False}
    noise = torch.Generator().manual_seed(0)
    y = torch.arange(10)
    return sample(model, DIFFUSION, y, 10, "ddim", generator=noise, **how)


def forward(probe: Any, x: torch.Tensor, t: int, y: list[int]) -> torch.Tensor:
    """What the page's network says: x (B, 1, 8, 8) -> (B, 2, 8, 8)."""
    given = [x.flatten().tolist(), t, y]
    eps, v = probe.evaluate(
        """([x, t, y]) => {
            const { eps, v } = network.forward(Float32Array.from(x), t, y);
            return [[...eps], [...v]];
        }""",
        given,
    )
    return torch.tensor([eps, v]).view(2, -1, 8, 8).transpose(0, 1)


def test_packed_numbers_are_those_of_the_model(model: DiffuSSM) -> None:
    found = unpack(json.loads(json.dumps(pack(model))))
    for name, tensor in numbers(model).items():
        exact = tensor.flatten().numpy()
        np.testing.assert_allclose(found[name], exact, rtol=2**-11, atol=2**-25)


def test_rounded_model_differs_by_rounding_only(
    model: DiffuSSM, halved: DiffuSSM
) -> None:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 300, 600, 999]), torch.arange(4)
    with torch.no_grad():
        difference = (model(x, t, y) - halved(x, t, y)).abs().max()
    assert 1e-6 < difference < 2e-3


def test_a_model_that_the_page_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no patches"):
        pack(DiffuSSM.from_preset("digits", patch_size=2))


@pytest.mark.slow
def test_digits_of_the_rounded_numbers_are_what_was_asked_for(halved: DiffuSSM) -> None:
    """The benchmark's row: 500 digits at guidance 1.5, read by a classifier."""
    row = recognised(halved)
    assert row["reached"], row["result"]


def environment(folder: Path, **about: Any) -> Any:
    """What Sphinx knows of the chapter, and where myst-nb keeps what is glued."""
    config = SimpleNamespace(output_folder=str(folder))
    known = {CHAPTER: about} if about else {}
    return SimpleNamespace(mystnb_config=config, nb_metadata=known)


EXECUTED = {"exec_data": {"succeeded": True}}


def test_weights_are_those_that_the_chapter_has_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glued = {GLUED: {"data": {"application/json": {"packed": 1}}}, "steps": {}}
    kept = tmp_path / f"{CHAPTER}.glue.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps(glued))
    executed = environment(tmp_path, glue=["steps", GLUED], **EXECUTED)
    assert trained(executed) == {"packed": 1}
    monkeypatch.setattr("page_model.shipped", lambda: "those of the package")
    assert trained(environment(tmp_path)) == "those of the package"
    assert GLUED == page_model.GLUED


@pytest.mark.parametrize("glue", [["steps"], [GLUED]], ids=["not glued", "not kept"])
def test_an_executed_chapter_without_its_model_is_refused(
    tmp_path: Path, glue: list[str]
) -> None:
    with pytest.raises(ExtensionError, match="was executed, and there is no 'page-m"):
        trained(environment(tmp_path, glue=glue, **EXECUTED))


PROJECT = f"""\
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_nb", "live_model"]
root_doc = "{FRONT}"
exclude_patterns = ["kept"]
nb_execution_mode = "cache"
nb_execution_cache_path = "kept"
"""
CELL = """\
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {name: python3, display_name: Python 3}
---
# Training

```{code-cell} ipython3
:tags: [remove-output]
raise SystemExit("outputs of this cell are kept")
```
"""
CONTENTS = "# Front\n\n```{live-model}\n```\n\n```{toctree}\n36_training\n```\n"


@pytest.mark.slow
def test_a_build_from_kept_outputs_has_the_model_of_the_chapter(tmp_path: Path) -> None:
    """As every `make book`: the chapters are executed first, then pages are made."""
    import jupytext
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    from nbformat.v4 import new_output

    (tmp_path / "book").mkdir()
    (tmp_path / "conf.py").write_text(PROJECT)
    (tmp_path / f"{FRONT}.md").write_text(CONTENTS)
    chapter = tmp_path / f"{CHAPTER}.md"
    chapter.write_text(CELL)
    strip = base64.b64encode(bytes(range(256)) * 4).decode()
    model = {"packed": {"half": "AAAA"}, "label": 3, "strip": strip}
    about = {"scrapbook": {"name": GLUED, "mime_prefix": ""}}
    data = {"application/json": model, "text/plain": "a model"}
    notebook = jupytext.read(chapter)
    language = {"name": "python", "pygments_lexer": "python"}
    notebook.metadata["language_info"] = language  # as a kernel says
    notebook.cells[-1].outputs = [new_output("display_data", data, metadata=about)]
    get_cache(str(tmp_path / "kept")).cache_notebook_bundle(
        CacheBundleIn(notebook, str(chapter)), check_validity=False
    )
    made = tmp_path / "_build" / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(tmp_path), str(made)]
    subprocess.run(command, cwd=tmp_path, check=True)
    written = (made / "_static" / "live_model.js").read_text("utf-8")
    assert written == script(model["packed"])
    assert strip in (made / f"{FRONT}.html").read_text("utf-8")


def test_the_front_page_is_made_anew_with_the_chapter() -> None:
    env: Any = SimpleNamespace(found_docs={FRONT, CHAPTER})
    assert follow(None, env, set(), {CHAPTER}, set()) == [FRONT]  # type: ignore[arg-type]
    assert follow(None, env, {"book/99_cli"}, set(), set()) == []  # type: ignore[arg-type]


@pytest.mark.end_to_end
@pytest.mark.parametrize("t", [0, 20, 500, 999])
def test_page_computes_what_pytorch_does(
    probe: Any, model: DiffuSSM, halved: DiffuSSM, ten: torch.Tensor, t: int
) -> None:
    """Within a thousandth of the largest output that float32 has, and within float32
    of what PyTorch makes of the page's own numbers.
    """
    noise = torch.randn(ten.shape, generator=torch.Generator().manual_seed(t))
    y, times = list(range(10)), torch.full((10,), t)
    x = DIFFUSION.q_sample(ten, times, noise)
    page = forward(probe, x, t, y)
    with torch.no_grad():
        exact, same = model(x, times, y), halved(x, times, y)
    assert (page - exact).abs().max() < 1e-3 * exact.abs().max()
    assert (page - same).abs().max() < 2e-5


@pytest.mark.end_to_end
def test_chains_are_those_of_respacing(probe: Any) -> None:
    chains = probe.evaluate(
        """() => Array.from({ length: 60 }, (_, k) => {
            const chain = new probe.Chain(k + 1);
            const logs = chain.timesteps.map((_, s) => chain.posteriorLogVariance(s));
            return [chain.timesteps, chain.after, logs];
        })"""
    )
    for steps, (timesteps, after, logs) in enumerate(chains, start=1):
        wanted = DIFFUSION.respace(steps)
        assert timesteps == wanted.timestep_map.tolist()
        np.testing.assert_allclose(after, wanted.alphas_cumprod, rtol=1e-11)
        clipped = wanted.posterior_log_variance_clipped
        np.testing.assert_allclose(logs, clipped, rtol=1e-6)


@pytest.mark.end_to_end
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_page_walks_as_ddim_does(probe: Any, halved: DiffuSSM, scale: float) -> None:
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    page = probe.evaluate(
        """([x, guidance]) => {
            const how = { label: 7, guidance, method: "ddim" };
            const chain = new probe.Chain(9);
            const steps = probe.denoise(network, chain, Float32Array.from(x), how);
            return [...steps].map(({ t, x, image }) => [t, [...x], [...image]]);
        }""",
        [noise.flatten().tolist(), scale],
    )
    how = {"steps": 9, "method": "ddim", "cfg_scale": scale, "clip_denoised": True}
    steps = denoise(halved, DIFFUSION, torch.tensor([7]), noise=noise, **how)
    for (t, x, image), wanted in zip(page, steps, strict=True):
        assert t == wanted[0]
        np.testing.assert_allclose(x, wanted[1].flatten(), atol=5e-4)
        np.testing.assert_allclose(image, wanted[2].flatten(), atol=5e-4)


@pytest.mark.end_to_end
def test_page_steps_back_as_ancestral_sampling_does(
    probe: Any, halved: DiffuSSM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise that the page has drawn, from each step of a short chain."""
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(8))
    noise, steps = probe.evaluate(
        """(x) => {
            const normal = probe.normals(5);
            const noise = Array.from({ length: 3 * 64 }, probe.normals(5));
            const how = { label: 2, guidance: 2, method: "ddpm", normal };
            const chain = new probe.Chain(4);
            const steps = probe.denoise(network, chain, Float32Array.from(x), how);
            return [noise, [...steps].map(({ x }) => [...x])];
        }""",
        x.flatten().tolist(),
    )
    drawn = iter(torch.tensor(noise).view(3, 1, 1, 8, 8))
    monkeypatch.setattr(
        "diffussm.reverse_process.standard_normal", lambda *_: next(drawn)
    )
    chain, predict = DIFFUSION.respace(4), guided(halved, 2.0)
    for step, page in zip(range(3, -1, -1), steps, strict=True):
        x, _ = ancestral_step(predict, chain, x, step, torch.tensor([2]), None, True)
        np.testing.assert_allclose(page, x.flatten(), atol=5e-4)


@pytest.mark.end_to_end
def test_noise_is_normal_and_a_seed_repeats_it(probe: Any) -> None:
    first, again, other = (
        probe.evaluate("(s) => [...probe.noiseOf(probe.normals(s), 20000)]", seed)
        for seed in (3, 3, 4)
    )
    assert first == again
    values = np.array([first, other])
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs((values**4).mean() - 3) < 0.15  # no heavier tails than a normal has
    assert abs(np.corrcoef(values)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03


@pytest.mark.end_to_end
def test_every_half_is_read_and_erf_is_close(probe: Any) -> None:
    bits = np.arange(2**16, dtype="<u2")
    text = base64.b64encode(bits.tobytes()).decode()
    page = probe.evaluate("(s) => [...probe.readHalf(s)].map(String)", text)
    wanted = bits.view("<f2").astype(np.float64)
    np.testing.assert_array_equal(np.array(page, dtype=np.float64), wanted)
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    close = probe.evaluate("(x) => x.map(probe.erf)", x.tolist())
    np.testing.assert_allclose(close, torch.erf(x), rtol=0, atol=1.5e-7)


@pytest.mark.end_to_end
def test_strip_has_the_first_and_the_last_step(probe: Any) -> None:
    for steps in range(1, 51):
        shown = probe.evaluate("probe.shownSteps", steps)
        assert shown[-1] == steps - 1 and len(shown) == min(steps, 8)
        assert sorted(set(shown)) == shown and shown[0] == 0


BIG = ".live-model-digit canvas"
PIXELS = """(canvas) => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height);
    const pen = copy.getContext("2d", { willReadFrequently: true });
    pen.drawImage(canvas, 0, 0);
    const place = (k) => Math.round(((k + 0.5) / 8) * canvas.width);
    return Array.from({ length: 64 }, (_, i) =>
        pen.getImageData(place(i % 8), place(Math.floor(i / 8)), 1, 1).data[0]);
}"""


def pixels(tab: Any) -> list[int]:
    """The greys of the big picture, once it has been drawn."""
    tab.evaluate(
        "() => new Promise((r) => requestAnimationFrame(() => setTimeout(r, 30)))"
    )
    return list(tab.eval_on_selector(BIG, PIXELS))


def done(tab: Any) -> list[int]:
    """What the big picture shows when the model has finished."""
    tab.wait_for_selector("[data-state=done]")
    return pixels(tab)


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", ["file", "http"])
def test_page_draws_by_itself_and_as_asked(
    browser: Any, site: Path, served: str, how: str
) -> None:
    address = site.as_uri() if how == "file" else served
    tab = opened(browser, f"{address}/auto.html")
    by_itself = done(tab)
    tab.click("[data-class='8']")
    tab.wait_for_selector("[data-class='8'][aria-pressed=true]")
    eight = done(tab)
    assert eight != by_itself and min(eight) < 60 and max(eight) > 200
    tab.click("[data-class='1']")
    assert done(tab) not in (eight, by_itself)
    tab.click("[data-class='8']")
    assert done(tab) == eight, "the same seed draws the same digit"
    tab.get_by_role("button", name="Other noise").click()
    assert done(tab) != eight
    assert tab.complaints == []
    tab.close()


FIRST_MESSAGE = """() => {
    const post = Worker.prototype.postMessage;
    Worker.prototype.postMessage = function (message) {
        Worker.prototype.postMessage = post;
        %s;
    };
}"""


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "first, reason",
    [
        ("", "live_model.js is missing"),
        ("post.call(this, { id: 1 })", "TypeError"),  # no weights: drawing fails
        ("post.call(this, { packed: {} })", "TypeError"),  # damaged: unpacking fails
        ("this.dispatchEvent(new MessageEvent('messageerror'))", "cannot be read"),
    ],
)
def test_page_says_that_the_model_failed_and_asks_anew(
    browser: Any, served: str, first: str, reason: str
) -> None:
    tab = opened(browser, f"{served}/quiet.html")
    if first:
        tab.evaluate(FIRST_MESSAGE % first)
    else:
        tab.route("**/live_model.js", lambda route: route.abort())
    tab.click("[data-class='5']")
    tab.wait_for_selector("[data-state=failed]", timeout=10_000)
    assert reason in tab.inner_text(".live-model-status")
    tab.unroute_all()
    tab.click("[data-class='5']")
    assert max(done(tab)) > 200
    assert tab.inner_text(".live-model-status") == "A 5."
    tab.close()


@pytest.fixture
def quiet(browser: Any, site: Path) -> Iterator[Any]:
    """A page that waits, for someone who asked for less motion."""
    tab = opened(browser, (site / "quiet.html").as_uri(), reduced_motion="reduce")
    yield tab
    assert tab.complaints == []
    tab.close()


@pytest.mark.end_to_end
def test_controls_change_what_is_drawn(quiet: Any) -> None:
    quiet.click("[data-class='5']")
    seen = [done(quiet)]
    quiet.get_by_label("guidance").press("End")
    seen.append(done(quiet))
    quiet.get_by_label("steps").press("Home")
    seen.append(done(quiet))
    quiet.get_by_label("sampler").select_option("ddpm")
    seen.append(done(quiet))
    quiet.get_by_label("seed").fill("12")
    quiet.get_by_label("seed").press("Enter")
    seen.append(done(quiet))
    assert len({tuple(image) for image in seen}) == len(seen)


@pytest.mark.end_to_end
def test_one_can_draw_and_the_model_goes_on(quiet: Any) -> None:
    quiet.get_by_role("button", name="Clear").click()
    assert set(pixels(quiet)) == {0}
    box = quiet.locator(BIG).bounding_box()
    edge = box["width"] / 8
    quiet.mouse.move(box["x"] + 3.5 * edge, box["y"] + 0.5 * edge)
    quiet.mouse.down()
    quiet.mouse.move(box["x"] + 3.5 * edge, box["y"] + 7.5 * edge, steps=20)
    quiet.mouse.up()
    one = np.array(pixels(quiet)).reshape(8, 8)
    assert (one[:, 3] == 255).all() and one.sum() == 8 * 255
    quiet.get_by_label("noise up to").fill("20")
    quiet.get_by_role("button", name="Go on").click()
    near = np.array(done(quiet)).reshape(8, 8)
    quiet.get_by_label("noise up to").fill("999")
    far = np.array(done(quiet)).reshape(8, 8)
    assert 0 < np.abs(near - one).mean() < 40 < np.abs(far - one).mean()


@pytest.mark.end_to_end
def test_one_can_draw_by_keyboard(quiet: Any) -> None:
    quiet.get_by_role("button", name="Clear").click()
    quiet.focus(BIG)
    for key in ("ArrowRight", "ArrowDown", " ", "ArrowLeft", "ArrowLeft", " "):
        quiet.keyboard.press(key)
    assert quiet.inner_text(".live-model-status") == "row 2, column 1: white"
    quiet.evaluate("document.activeElement.blur()")
    drawn = pixels(quiet)
    assert [i for i, value in enumerate(drawn) if value] == [8, 9]
    quiet.focus(BIG)
    quiet.keyboard.press(" ")
    quiet.keyboard.press("Enter")  # lets the model go on
    done(quiet)


@pytest.mark.end_to_end
def test_less_motion_shows_the_prepared_digit_and_then_results(
    browser: Any, site: Path
) -> None:
    address = (site / "auto.html").as_uri()
    tab = opened(browser, address, reduced_motion="reduce")
    tab.wait_for_timeout(300)
    assert tab.locator("[data-state=waiting]").count() == 1
    assert len(set(pixels(tab))) > 3, "the prepared digit"
    assert not tab.evaluate("'liveModel' in globalThis"), "weights not asked for yet"
    tab.close()


@pytest.mark.end_to_end
def test_controls_have_names_and_are_large_enough(quiet: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(quiet)
    assert found.violations_count == 0, found.generate_report()
    for control in quiet.locator("#live-model button, #live-model input").all():
        box = control.bounding_box()
        assert box["height"] >= 24 and box["width"] >= 24, control.inner_text()


HEAR = """() => {
    const post = Worker.prototype.postMessage;
    globalThis.heard = [];
    Worker.prototype.postMessage = function (message) {
        const keep = ({ data }) => heard.push([[...data.before], [...data.x]]);
        if (message.packed) this.addEventListener("message", keep);
        return post.call(this, message);
    };
}"""


@pytest.fixture(scope="module")
def handed_over(book: Path) -> Any:
    """The weights that the rendered pages load."""
    text = (book / "_static" / "live_model.js").read_text("utf-8")
    return json.loads(text.removeprefix("globalThis.liveModel = ").rstrip(";\n"))


@pytest.fixture(scope="module")
def on_the_page(handed_over: Any) -> DiffuSSM:
    """PyTorch's network with the numbers of the rendered pages."""
    return computing_with(unpack(handed_over), DiffuSSM(RECIPES["digits"].model))


def put_out() -> Any:
    """What the chapter's executed cell has glued, by the cache of executions."""
    import jupytext
    from jupyter_cache import get_cache

    quick = "_quick" if is_quick() else ""
    cache = get_cache(str(ROOT / "_build" / f".jupyter_cache{quick}"))
    try:
        record = cache.match_cache_notebook(jupytext.read(ROOT / f"{CHAPTER}.md"))
    except KeyError:
        absent(f"no outputs of {CHAPTER}.md: run `make book`", "DIFFUSSM_REQUIRE_BOOK")
    found = [
        output["data"]["application/json"]
        for cell in cache.get_cache_bundle(record.pk).nb.cells
        for output in cell.get("outputs", [])
        if output.get("metadata", {}).get("scrapbook", {}).get("name") == GLUED
    ]
    (one,) = found
    return one


@pytest.mark.end_to_end
def test_rendered_pages_have_what_the_chapter_has_trained(
    book: Path, handed_over: Any
) -> None:
    model = put_out()
    assert handed_over == model["packed"]
    for page in (FRONT, CHAPTER):
        text = (book / f"{page}.html").read_text("utf-8")
        (given,) = re.findall(
            r' id="live-model".*?<script type="application/json">(.*?)</script>',
            text,
            re.DOTALL,
        )
        assert json.loads(given)["strip"] == model["strip"], page


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", ["file", "http"])
@pytest.mark.parametrize("page", [FRONT, CHAPTER])
def test_rendered_page_draws_the_digit_that_pytorch_draws(
    browser: Any, book: Path, server: str, on_the_page: DiffuSSM, page: str, how: str
) -> None:
    """From the page's noise, with the page's weights: the numbers, and the picture."""
    site = book.as_uri() if how == "file" else server
    tab = opened(browser, f"{site}/{page}.html", site, reduced_motion="reduce")
    tab.evaluate(HEAR)
    tab.click("[data-class='8']")
    shown = done(tab)
    steps = tab.evaluate("heard")
    assert tab.inner_text(".live-model-status") == "A 8."
    noise = torch.tensor(steps[0][0]).view(1, 1, 8, 8)
    how_asked = {"cfg_scale": 1.5, "clip_denoised": True, "progress": False}
    wanted = sample(
        on_the_page, DIFFUSION, [8], len(steps), "ddim", noise=noise, **how_asked
    ).flatten()
    np.testing.assert_allclose(steps[-1][1], wanted, atol=5e-4)
    np.testing.assert_allclose(shown, 127.5 * (wanted + 1), atol=1)
    assert len(steps) == 25 and tab.complaints == []
    tab.close()
