"""Weights in the box: what stands beside them, what may be halved, who draws with
them.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import diffussm
from PIL import Image

from diffussm import look_commands
from diffussm.model import DiffuSSM
from diffussm.options import diffusion_of
from diffussm.pipeline import DiffuSSMPipeline
from diffussm.pretrained import halved, load_pretrained, pretrained_names
from diffussm.recipes import open_held_out
from diffussm.sample_options import Sampler
from diffussm.sampling import draw
from diffussm.watching import held_out_bits
from tools.book import ROOT

NAMES = pretrained_names()


def test_every_folder_of_weights_is_named_and_none_is_large():
    box = ROOT / "diffussm" / "weights"
    assert "digits" in NAMES == sorted(path.name for path in box.iterdir())
    size = sum(file.stat().st_size for file in box.rglob("*") if file.is_file())
    assert size < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_whence_and_how_good(name):
    box = load_pretrained(name)
    assert {"command", "seed", "data", "licence", "figures"} <= box.record.keys()
    assert box.record["seed"] == box.recipe.seed
    assert "diffussm train" in json.dumps(box.record["command"])
    assert len(box.data["classes"]) == box.recipe.model.num_classes
    assert box.model().config == box.recipe.model
    assert "20" + "26" not in json.dumps(box.record)  # no dates
    stored, all_half = box.record["half precision"]["largest difference"].values()
    assert stored < all_half


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_in_half_precision_but_the_kernels(name):
    import safetensors.torch

    folder = load_pretrained(name).folder
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    for key, tensor in stored.items():
        precise = key.endswith(("log_dt", "log_A_real", "A_imag", "kernel.C"))
        assert tensor.dtype == (torch.float32 if precise else torch.float16), key
    again = halved({key: tensor.float() for key, tensor in stored.items()})
    assert all(torch.equal(again[key], stored[key]) for key in stored)


@pytest.mark.slow
def test_half_precision_of_the_kernels_is_what_harms():
    """Of weights that float16 does not hold, as a run has them."""
    box, exact = load_pretrained("digits"), load_pretrained("digits").model()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in exact.parameters():
            nudge = torch.rand(parameter.shape, generator=noise) * 2**-12
            parameter.mul_(1 + nudge)
    weights = exact.state_dict()
    less, least = box.model(), box.model()
    less.load_state_dict(halved(weights))
    least.load_state_dict({key: tensor.half() for key, tensor in weights.items()})
    how = Sampler(10, "ddim", cfg_scale=1.5, clip_denoised=True)

    def drawn(model):
        seeded = {"generator": torch.Generator().manual_seed(0), "progress": False}
        return draw(how, model, diffusion_of(box.recipe), torch.arange(10), **seeded)

    first = drawn(exact)
    stored, coarse = ((drawn(model) - first).abs().max() for model in (less, least))
    assert 0 < stored < 0.02 and coarse > 2 * stored


def test_one_line_draws_threes(tmp_path):
    words = "sample --pretrained digits --classes 3 --steps 4 --device cpu"
    said = diffussm(f"{words} --grid {tmp_path}/threes.png")
    assert f"wrote {tmp_path}/threes.png" in said
    assert np.asarray(Image.open(tmp_path / "threes.png")).shape[0] == 52


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_way_to_look_takes_the_box(tmp_path):
    words = "sample --pretrained digits --classes 3,8 --steps 3 --device cpu"
    for more in (
        "--cfg_scale 1,2 --seeds 0,1 --grid {t}/a.png",
        "--interpolate 3,7 --gif {t}/b.gif",
        "--scheduler UniPCMultistep --per_class 2 --grid {t}/c.png",
    ):
        diffussm(f"{words} {more}", t=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_set_says_which_weights_drew_it(tmp_path):
    words = "sample --pretrained digits --count 6 --steps 2 --device cpu"
    diffussm(f"{words} --out {tmp_path}/set")
    how = json.loads((tmp_path / "set" / "samples.json").read_text())
    assert how["pretrained"] == "digits" and how["checkpoint"] == "step_00001500"
    assert len(list((tmp_path / "set").glob("*.png"))) == 6
    said = diffussm(f"sample --pretrained digits --device cpu --out {tmp_path}/x", 1)
    assert "50,000" in said and "1,438" in said


def test_another_name_is_refused_with_those_in_the_box(tmp_path):
    words = f"sample --device cpu --grid {tmp_path}/x.png"
    said = diffussm(f"{words} --pretrained digit", 1)
    assert "did you mean 'digits'?" in said and said.count("\n") == 1
    assert f"--pretrained NAME ({', '.join(NAMES)})" in diffussm(words, 1)
    both = f"{words} --pretrained digits --from {tmp_path}"
    assert "either" in diffussm(both, 1)
    for idle in ("--step 3", "--weights model"):
        assert "no effect" in diffussm(f"{words} --pretrained digits {idle}", 1)
    with pytest.raises(ValueError, match=r"pretrained='cats'.*digits"):
        load_pretrained("cats")


def test_an_export_of_the_box_is_a_pipeline_of_its_weights(tmp_path):
    diffussm(f"export --pretrained digits {tmp_path}/new --format safetensors")
    diffussm(f"export {tmp_path}/again --pretrained=digits --format safetensors")
    ours = load_pretrained("digits").model().state_dict()
    for folder in (tmp_path / "new", tmp_path / "again"):
        for name, tensor in DiffuSSM.from_pretrained(folder).state_dict().items():
            assert torch.equal(tensor, ours[name])
        facts = json.loads((folder / "export.json").read_text())
        assert facts["training"]["pretrained"] == "digits"
    for wrong, said in (
        ("export --pretrained digit {t}/x", "did you mean 'digits'?"),
        ("export --pretrained digits {t} {t}/x", "is more than"),
        ("export --pretrained digits {t}/x --step 3", "no effect"),
        ("export --pretrained emoji {t}/x --vae {t}", "which has what decodes"),
        ("bound --pretrained digits --weights model", "no effect"),
        ("demo --pretrained digits --port none", "at least 1"),
        ("show --pretrained digits", "there is no option --pretrained"),
        ("train digits --pretrained digits --out {t}/x", "no option --pretrained"),
    ):
        told = diffussm(wrong, (1, 2), t=tmp_path)
        assert said in told and told.count("\n") == 1, told
    assert {file.name for file in tmp_path.iterdir()} == {"new", "again"}


def test_a_folder_of_that_name_is_not_taken_for_the_box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    diffussm("export --pretrained digits new --format safetensors")
    with pytest.raises(FileNotFoundError, match="model_index"):
        DiffuSSMPipeline.from_pretrained("digits")


def test_the_demo_draws_with_the_box(monkeypatch):
    pages = []
    page = SimpleNamespace(launch=lambda **_: None)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setattr(
        look_commands, "page_of", lambda _, pipe: (pages.append(pipe), page)[1]
    )
    for name in NAMES:
        diffussm(f"demo --pretrained {name} --device cpu")
    digits, emoji = pages
    assert digits.vae is None and emoji.vae is not None


def test_the_bound_of_the_box_is_that_of_its_weights():
    words = "bound --pretrained digits --count 2 --steps 3 --device cpu"
    box = load_pretrained("digits")
    data = open_held_out("", box.recipe, box.data["classes"])
    bits = held_out_bits(box.model().eval(), box.recipe, data, 2, 3)
    assert json.loads(diffussm(words)).items() >= bits.items()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_latents_in_the_box_bring_their_decoder_and_their_licence(tmp_path):
    box = load_pretrained("emoji")
    assert "CC BY-SA 4.0" in box.record["licence"] and "OpenMoji" in box.record["data"]
    assert "CC BY-SA 4.0" in (ROOT / "README.md").read_text()
    words = "sample --pretrained emoji --classes hearts --per_class 2 --steps 2"
    diffussm(f"{words} --device cpu --grid {tmp_path}/hearts.png")
    with Image.open(tmp_path / "hearts.png") as picture:
        assert picture.mode == "RGB" and picture.height == 68
