"""A folder that loads with our package, and one that needs no package."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from pipelines import NAMES, draw, network, piped, small_vae  # noqa: E402

from diffussm import pipeline  # noqa: E402
from diffussm.model import DiffuSSM  # noqa: E402
from diffussm.options import RECIPES  # noqa: E402
from diffussm.pipeline import DiffuSSMPipeline  # noqa: E402
from diffussm.runs import train  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def states(pipe):
    """dtypes of the S4D parameters and of all others."""
    found = {True: set(), False: set()}
    for name, parameter in pipe.denoiser.named_parameters():
        found[name.endswith(("log_dt", "log_A_real", "A_imag", ".C"))].add(
            parameter.dtype
        )
    return found[True], found[False]


@pytest.mark.parametrize("way", ["torch_dtype", "to", "half", "diffusers"])
def test_half_precision_leaves_the_state_spaces_in_float32(
    saved, way, tmp_path, monkeypatch
):
    dtype = torch.float16 if way == "half" else torch.bfloat16
    if way == "torch_dtype":
        pipe = load(saved.folder, torch_dtype=dtype)
    elif way == "diffusers":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(
            "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path)
        )
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(saved.folder), trust_remote_code=True, torch_dtype=dtype
        )
        assert type(pipe.denoiser).__module__.startswith("diffusers_modules")
    else:
        pipe = load(saved.folder)
        pipe = pipe.to(dtype) if way == "to" else pipe
        pipe.denoiser = pipe.denoiser.half() if way == "half" else pipe.denoiser
    pipe.set_progress_bar_config(disable=True)
    assert states(pipe) == ({torch.float32}, {dtype})
    full = draw(load(saved.folder))
    assert 0 < (draw(pipe) - full).abs().max() < 0.05 * full.abs().max()


COPIES = """
import sys, torch, diffusers
from diffusers import DiffusionPipeline
from diffussm.pipeline import DiffuSSMPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe(0, num_inference_steps=3, generator=seed, output_type="latent").images

ours = DiffuSSMPipeline.from_pretrained(FOLDER)
expected = draw(ours)
for copy in range(10):  # each time diffusers runs the code in the folder again
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]
    other = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    assert type(other.denoiser) is not type(ours.denoiser)
    assert torch.equal(draw(other), expected), copy
    assert torch.equal(draw(ours), expected), copy
with torch.enable_grad():
    for pipe in (ours, other):
        pipe.denoiser.requires_grad_(True)
        x, t, y = torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([1])
        pipe.denoiser(x, t, y).sum().backward()
        gradients = [p.grad for p in pipe.denoiser.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
print("right")
"""


def test_ten_copies_of_the_code_live_beside_the_package(saved, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "ignore",
            "-c",
            f"FOLDER = {str(saved.folder)!r}\n{COPIES}",
        ],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr[-2000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-shark"
    pipe = piped(vae=small_vae(), training={"step": 7, "data": "sharks", "flip": None})
    pipe.save_pretrained(
        folder,
        license="cc-by-4.0",
        evaluation={
            "FID": 2.5,
            "precision": 0.75,
            "how": {"steps": 250, "guidance": {"scale": 1.5}},
        },
    )
    return SimpleNamespace(
        folder=folder,
        images=draw(pipe, ("white shark", 1), output_type="pt"),
        pipe=pipe,
    )


def load(folder, **options):
    pipe = DiffuSSMPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_saved_folder_loads_with_the_package(saved):
    pipe = load(saved.folder)
    assert torch.equal(draw(pipe, ("white shark", 1), output_type="pt"), saved.images)
    assert dict(pipe.config.id2label) == NAMES and pipe.config.training["step"] == 7
    weights = DiffuSSM.from_pretrained(saved.folder / "denoiser").state_dict()
    for name, tensor in saved.pipe.denoiser.state_dict().items():
        assert torch.equal(weights[name], tensor)
    assert load(saved.folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    other = diffusers.DDIMScheduler.from_config(saved.pipe.scheduler.config)
    assert load(saved.folder, scheduler=other).scheduler is other


ALONE = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffussm":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Nowhere())
sys.path[:] = [path for path in sys.path if path not in ("", ROOT)]
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

try:
    import diffussm
    raise SystemExit("diffussm could be imported")
except ModuleNotFoundError:
    pass
pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 5, "output_type": "pt"}
generator = torch.Generator().manual_seed(0)
images = pipe(["white shark", 1], generator=generator, **options).images
torch.save(images, OUT)
pipe.save_pretrained(AGAIN)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
assert pipe(0, guidance_scale=2.0, **options).images.isfinite().all()
try:
    type(pipe).from_run("nowhere")
except ImportError as error:
    assert "install" in str(error)
assert not [name for name in sys.modules if name.partition(".")[0] == "diffussm"]
"""


def test_saved_folder_needs_no_package(saved, tmp_path):
    places = {
        "FOLDER": saved.folder,
        "OUT": tmp_path / "images.pt",
        "AGAIN": tmp_path / "again",
    }
    places["ROOT"] = os.path.dirname(os.path.dirname(pipeline.__file__))
    names = "".join(f"{name} = {str(path)!r}\n" for name, path in places.items())
    done = subprocess.run(
        [sys.executable, "-c", names + ALONE],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(tmp_path / "code"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "might require the following packages" not in done.stderr
    assert "Expected types" not in done.stderr and "not expected by" not in done.stderr
    assert torch.equal(torch.load(places["OUT"], weights_only=True), saved.images)
    for name in (
        "pipeline.py",
        "model_index.json",
        "denoiser/modeling_diffussm.py",
    ):  # a copy of a copy
        assert (places["AGAIN"] / name).read_bytes() == (
            saved.folder / name
        ).read_bytes()
    assert torch.equal(
        draw(load(places["AGAIN"]), ("white shark", 1), output_type="pt"), saved.images
    )


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A pipeline of which only a variant was saved."""
    folder, pipe = tmp_path_factory.mktemp("halved") / "shark", piped(vae=small_vae())
    pipe.to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    return SimpleNamespace(folder=folder, weights=pipe.denoiser.state_dict())


def test_a_variant_has_names_of_its_own_and_comes_back(halved):
    files = {str(p.relative_to(halved.folder)) for p in halved.folder.glob("*/*.s*")}
    assert files == {
        "denoiser/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    pipe = load(halved.folder, variant="fp16")
    for name, tensor in pipe.denoiser.state_dict().items():
        assert torch.equal(tensor, halved.weights[name].float())
    assert load(halved.folder, variant="fp16", dtype=torch.float16).vae.dtype == (
        torch.float16
    )


def test_diffusers_loads_a_variant(halved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path)
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        str(halved.folder), trust_remote_code=True, variant="fp16"
    )
    for name, tensor in pipe.denoiser.state_dict().items():
        assert torch.equal(tensor, halved.weights[name].float())


def test_a_variant_that_is_not_there_is_named(saved, tmp_path):
    message = "trying to load the model files of the `variant=fp16`"
    with pytest.raises(ValueError, match=message):
        load(saved.folder, variant="fp16")
    with pytest.raises(ValueError, match="variant='../x': expected letters"):
        piped().save_pretrained(tmp_path / "new", variant="../x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_each_component_has_the_precision_that_it_was_given(saved, name):
    half, brain = torch.float16, torch.bfloat16
    for asked, denoiser, vae in (
        ({"denoiser": brain, "default": half}, brain, half),
        ({"vae": half}, torch.float32, half),
        (brain, brain, brain),
    ):
        pipe = load(saved.folder, **{name: asked})
        assert (pipe.denoiser.dtype, pipe.vae.dtype) == (denoiser, vae)
    for asked, message in (
        ({"transformer": half}, "dtype='transformer'.*denoiser, vae, default"),
        ("half", "dtype='half': expected torch's"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            load(saved.folder, **{name: asked})


def test_a_device_for_all_components(saved):
    pipe = DiffuSSMPipeline.from_pretrained(saved.folder, device_map="meta")
    assert {pipe.denoiser.device.type, pipe.vae.device.type} == {"meta"}
    with pytest.raises(ValueError, match="device_map='balanced': expected one device"):
        load(saved.folder, device_map="balanced")


def test_options_of_the_librarys_loader_are_taken(saved, caplog):
    idle = {"use_safetensors": True, "local_files_only": True}
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addHandler(caplog.handler)
    with caplog.at_level("INFO", logger.name):
        load(saved.folder, trust_remote_code=True, low_cpu_mem_usage=True, **idle)
    logger.removeHandler(caplog.handler)
    assert "Loaded denoiser as Denoiser" in caplog.text
    with pytest.raises(ValueError, match="only safetensors are read"):
        load(saved.folder, use_safetensors=False)


def test_diffusers_asks_before_it_runs_code(saved, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(str(saved.folder))


def test_folder_holds_safetensors_and_readable_code_only(saved):
    files = {
        str(path.relative_to(saved.folder))
        for path in saved.folder.rglob("*")
        if path.is_file()
    }
    assert files == {
        "README.md",
        "denoiser/config.json",
        "denoiser/model.safetensors",
        "denoiser/modeling_diffussm.py",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert [path.name for path in saved.folder.parent.iterdir()] == [
        "tiny-shark"
    ]  # no draft is left


def test_only_components_are_lists_in_the_index(saved):
    """diffusers takes every list in model_index.json for a component, and looks for
    its files on the hub.
    """
    index = json.loads((saved.folder / "model_index.json").read_text())
    lists = {key for key, value in index.items() if isinstance(value, list)}
    assert lists == {"_class_name", "denoiser", "scheduler", "vae"}
    from diffusers.pipelines.pipeline_loading_utils import (
        _get_custom_components_and_folders,
    )

    files = [
        str(path.relative_to(saved.folder))
        for path in saved.folder.rglob("*")
        if path.is_file()
    ]
    custom, _ = _get_custom_components_and_folders("someone/tiny-shark", index, files)
    assert custom == {"denoiser": "modeling_diffussm"}


def test_nothing_is_overwritten(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for folder in (saved.folder, tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        with pytest.raises(FileExistsError, match="nothing was written"):
            piped().save_pretrained(folder)
    with pytest.raises(ValueError, match="safetensors"):
        piped().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="push_to_hub"):
        piped().save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    pipe = piped()
    monkeypatch.setattr(
        pipe.scheduler,
        "save_pretrained",
        lambda _: (_ for _ in ()).throw(OSError("full")),
    )
    with pytest.raises(OSError, match="full"):
        pipe.save_pretrained(tmp_path / "half")
    assert not list(tmp_path.iterdir())


def damaged(saved, tmp_path):
    import shutil

    return shutil.copytree(saved.folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        (
            "model_index.json",
            None,
            FileNotFoundError,
            "there is no .*model_index.json: expected a saved pipeline",
        ),
        ("model_index.json", "{", ValueError, "is damaged"),
        ("model_index.json", "[]", ValueError, "is damaged"),
        (
            "denoiser/model.safetensors",
            None,
            FileNotFoundError,
            "there is no .*model.safetensors",
        ),
        ("denoiser/config.json", "{}", ValueError, "do not fit config.json"),
        (
            "scheduler/scheduler_config.json",
            None,
            ValueError,
            "no usable DDPMScheduler",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            None,
            ValueError,
            "no usable AutoencoderKL",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "x",
            ValueError,
            "no usable AutoencoderKL",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(
    saved, tmp_path, file, text, error, message
):
    folder = damaged(saved, tmp_path)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["os", "logging", "AutoencoderKL", "DiffusionPipeline", 3]
)
def test_an_index_cannot_make_us_call_anything_else(saved, tmp_path, name):
    folder = damaged(saved, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a scheduler of diffusers"):
        load(folder)


def test_our_loader_runs_no_code_of_the_folder(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    load(folder)


def test_other_pipelines_and_unknown_options_are_refused(saved, tmp_path):
    with pytest.raises(TypeError, match="no option 'revision'"):
        load(saved.folder, revision="main")
    folder = damaged(saved, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": ["p", "DiTPipeline"]})
    )
    with pytest.raises(ValueError, match="holds a DiTPipeline"):
        load(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = RECIPES["digits"]
    config = replace(
        recipe,
        model=replace(recipe.model, d_model=8, n_blocks=1, d_state=4),
        steps=2,
        batch_size=4,
        warmup=0,
        cooldown=0,
    )
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return folder, train(config, folder, device="cpu", progress=False)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_run_becomes_a_pipeline(run, weights, tmp_path):
    folder, state = run
    pipe = DiffuSSMPipeline.from_run(folder, weights)
    for name, tensor in getattr(state, weights).state_dict().items():
        assert torch.equal(pipe.denoiser.state_dict()[name], tensor)
    assert pipe.get_label_ids(["7", 3]) == [7, 3]
    facts = dict(pipe.config.training)
    assert (facts["weights"], facts["step"], facts["images_seen"]) == (weights, 2, 8)
    pipe.save_pretrained(tmp_path / "digits")
    assert "| images_seen | 8 |" in (tmp_path / "digits" / "README.md").read_text()
    assert dict(load(tmp_path / "digits").config.training) == facts


def test_a_kept_step_becomes_a_pipeline(run):
    folder, state = run
    pipe = DiffuSSMPipeline.from_run(folder, "model", step=2)
    assert torch.equal(pipe.denoiser.head.weight, state.model.head.weight)
    with pytest.raises(
        FileNotFoundError, match="has no checkpoint of step 1; there are 2"
    ):
        DiffuSSMPipeline.from_run(folder, step=1)


def test_latents_of_another_encoder_are_refused_and_the_decoder_is_recorded(
    tmp_path, monkeypatch
):
    """Of a run on latents; the encoder must be theirs, the decoder may be another."""
    from diffussm import autoencoder, run_folder

    vae = small_vae()
    made_by = autoencoder.vae_identity(vae, "/data/models/sd-vae")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({"vae": made_by}))
    (tmp_path / "config.json").touch()
    config = replace(RECIPES["digits"], data=str(tmp_path / "store"))
    monkeypatch.setattr(
        run_folder, "load_run", lambda *_: (network(), config, ["a", "b", "c"])
    )
    monkeypatch.setattr(
        run_folder, "find_checkpoint", lambda *_: tmp_path / "step_00000007"
    )
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    pipe = DiffuSSMPipeline.from_run(tmp_path, vae=vae)
    facts = pipe.config.training
    assert facts["latents"]["name"] == "sd-vae"  # not where it lies on someone's disk
    assert (
        facts["vae"]["encoder_sha256"]
        == made_by["encoder_sha256"]
        == facts["latents"]["encoder_sha256"]
    )
    assert facts["vae"]["decoder_sha256"] != made_by["decoder_sha256"]
    pipe.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| vae.decoder_sha256 | {facts['vae']['decoder_sha256']} |" in card
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1)
    with pytest.raises(ValueError, match="made by the encoder of"):
        DiffuSSMPipeline.from_run(tmp_path, vae=vae)


def test_no_run_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a training run"):
        DiffuSSMPipeline.from_run(tmp_path)


def test_weights_in_the_box_make_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = load("digits", scheduler=diffusers.DDIMScheduler(), dtype=torch.float16)
    assert states(pipe) == ({torch.float32}, {torch.float16})
    pipe = load("digits")
    assert pipe.config.training["pretrained"] == "digits"
    assert pipe.config.training["licence"].startswith("Apache-2.0")
    assert len(draw(pipe, "3", num_inference_steps=3)) == 1
    # a folder of that name comes first, whatever is in it
    (tmp_path / "digits").mkdir()
    with pytest.raises(FileNotFoundError, match="digits/model_index.json"):
        load("digits")
    pipe.save_pretrained(tmp_path / "digits", name="of one's own")
    assert "pretrained" in load("digits").config.training
    with pytest.raises(FileNotFoundError, match=r"cats/model_index.json.*or digits"):
        load("cats")
    with pytest.raises(ValueError, match="variant=fp16"):
        load("digits", variant="fp16")
