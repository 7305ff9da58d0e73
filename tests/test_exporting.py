"""The network for other programs: each form read by the program that it is for."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
from commands import diffussm
from pipelines import network, piped

import diffussm as package
from diffussm.bidirectional import BidirectionalSSM
from diffussm.exporting import DepthwiseSSM, export_network, fixed_length, traced
from diffussm.schedulers import ancestral_scheduler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
MODELS = {
    "classes": {"downsample": 2, "patch_size": 1},
    "none": {"num_classes": 0, "downsample": 1, "patch_size": 2, "input_size": 8},
}
FORMATS = ("pipeline", "safetensors", "torch", "onnx")


@pytest.mark.parametrize("length", [1, 7, 64])
def test_the_depthwise_layer_is_the_layer(length):
    torch.manual_seed(0)
    ssm, u = BidirectionalSSM(6, 8), torch.randn(2, length, 6)
    with torch.no_grad():
        layer = DepthwiseSSM(ssm, length)
        torch.testing.assert_close(layer(u), ssm(u), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"L={length}"):
        layer(torch.zeros(1, length + 1, 6))


def test_a_network_of_one_length_shares_its_weights_and_leaves_the_original():
    model = network()
    fixed = fixed_length(model)
    assert fixed.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert all(isinstance(block.ssm, BidirectionalSSM) for block in model.blocks)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """All forms of a network, and what it makes of some inputs."""
    home, model = tmp_path_factory.mktemp("exported"), network(**MODELS[request.param])
    found = {f: export_network(piped(model), home / f, f) for f in FORMATS}
    assert max(found.values()) < 1e-4
    torch.manual_seed(1)
    x, t = torch.randn(5, 4, *[model.config.input_size] * 2), 999 * torch.rand(5)
    y = torch.tensor([0, 1, 2, 3, 3])
    inputs = (x, t, y) if model.config.num_classes else (x, t)
    with torch.no_grad():
        torch.save([inputs, model(*inputs)], home / "known.pt")
    return home


ALONE = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Nowhere())
sys.path[:] = [path for path in sys.path if path not in ("", ROOT)] + ["."]
for name in BLOCKED:
    try:
        __import__(name)
        raise SystemExit(f"{name} could be imported")
    except ModuleNotFoundError:
        pass
"""
BY_TORCH = """
exec(open("README.md").read().split("```")[1].removeprefix("python"))
inputs, expected = torch.load("../known.pt")
assert output.shape[1:] == expected.shape[1:]
torch.set_grad_enabled(False)
worst = max(
    (denoiser(*(v[:n] for v in inputs)) - expected[:n]).abs().max() for n in (1, 2, 5)
)
assert worst < 1e-4 * expected.abs().max(), worst
"""
BY_DIFFUSERS = """
import torch
from diffusers import DiffusionPipeline
denoiser = DiffusionPipeline.from_pretrained(".", trust_remote_code=True).denoiser
inputs, expected = torch.load("../known.pt")
assert (denoiser(*inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
"""
BY_ONNX = """
exec(open("README.md").read().split("```")[1].removeprefix("python"))
known = np.load("../known.npz")
assert output.shape[1:] == known["output"].shape[1:]
for n in (1, 2, 5):
    given = {i.name: known[i.name][:n] for i in session.get_inputs()}
    found, expected = session.run(None, given)[0], known["output"][:n]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
"""


def alone(folder, code, *blocked):
    """Run code in a folder, in a process that can not import this package."""
    root = os.path.dirname(os.path.dirname(package.__file__))
    names = f"BLOCKED, ROOT = {['diffussm', *blocked]}, {root!r}\n"
    environment = {
        "HF_MODULES_CACHE": str(folder.parent / "code"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", names + ALONE + code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_pytorch_and_diffusers_read_it_without_the_package(exported):
    readers = {"safetensors": BY_TORCH, "torch": BY_TORCH, "pipeline": BY_DIFFUSERS}
    moved = [f"os.chdir('../{form}')\n{code}" for form, code in readers.items()]
    alone(exported / "onnx", "\n".join(["import os", *moved]))


def test_onnx_runtime_reads_it_without_the_package_and_pytorch(exported):
    import numpy as np

    inputs, output = torch.load(exported / "known.pt")
    known = dict(zip("xty", [v.numpy() for v in inputs], strict=False))
    np.savez(exported / "known.npz", output=output.numpy(), **known)
    alone(exported / "onnx", BY_ONNX, "torch")


def test_a_graph_holds_plain_convolutions_and_no_operator_of_ours():
    model = network(n_blocks=2)
    nodes = [n for n in traced(model).graph.nodes if n.op == "call_function"]
    names = [str(node.target) for node in nodes]
    assert sum("conv1d" in name for name in names) == 4
    assert not [name for name in names if "fft" in name or "diffussm" in name]
    values = [node.meta.get("val") for node in nodes]
    assert not [v for v in values if torch.is_tensor(v) and v.is_complex()]


def test_onnx_holds_operators_of_onnx_only(exported):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported / "onnx" / "denoiser.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert "Conv" in kinds and not kinds & {"DFT", "STFT"}
    assert {node.domain for node in graph.node} == {""}  # of ONNX itself


def test_the_page_and_the_record_say_what_is_inside(exported):
    record = json.loads((exported / "torch" / "export.json").read_text())
    classes = record["model"]["num_classes"]
    assert record["num_train_timesteps"] == 1000 and record["difference"] < 1e-4
    assert (record["id2label"] != {}) == (classes > 0)
    for form in ("safetensors", "torch", "onnx"):
        text = (exported / form / "README.md").read_text()
        assert "scheduler is not inside" in text and ("| `y` |" in text) == (
            classes > 0
        )
        named = re.search(r"`(DDPMScheduler\([^`]*\))`", text)[1]
        told = eval(named, {"DDPMScheduler": diffusers.DDPMScheduler})
        ours = ancestral_scheduler(1000)
        assert torch.equal(told.alphas_cumprod, ours.alphas_cumprod)
        choices = "variance_type", "clip_sample", "prediction_type", "timestep_spacing"
        for key in choices:
            assert told.config[key] == ours.config[key]


def test_what_differs_is_not_left_behind(tmp_path, monkeypatch):
    def forgetful(self, u, prepared=None):
        past = torch.nn.functional.pad(u, (0, 0, 1, 0))[:, :-1]
        return torch.cat([past, u], dim=2)

    monkeypatch.setattr(DepthwiseSSM, "forward", forgetful)
    with pytest.raises(ValueError, match="was not kept"):
        export_network(piped(), tmp_path / "new", "torch")
    monkeypatch.undo()
    broken = piped()
    broken.denoiser.embed_x.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="differs by nan .* was not kept"):
        export_network(broken, tmp_path / "new", "safetensors")
    assert not list(tmp_path.iterdir())


def test_a_graph_for_two_images_takes_two(tmp_path):
    model = network()
    assert export_network(piped(model), tmp_path / "two", "torch", 2) < 1e-4
    graph = torch.export.load(tmp_path / "two" / "denoiser.pt2").module()
    x, t, y = torch.randn(3, 4, 4, 4), torch.zeros(3), torch.tensor([0, 1, 2])
    assert graph(x[:2], t[:2], y[:2]).shape == (2, 8, 4, 4)
    with pytest.raises(Exception, match="2"):
        graph(x, t, y)
    assert "(2, 4, 4, 4)" in (tmp_path / "two" / "README.md").read_text()


def test_half_precision_is_kept_by_weights_and_refused_by_graphs(tmp_path):
    whole, half = piped(), piped()
    half.to(torch.float16)
    for form in ("pipeline", "safetensors"):
        for name, pipe in (("whole", whole), ("half", half)):
            assert export_network(pipe, tmp_path / f"{form}-{name}", form) < 1e-4
    sizes = [
        (tmp_path / f"safetensors-{name}" / "model.safetensors").stat().st_size
        for name in ("half", "whole")
    ]
    assert sizes[0] < 0.7 * sizes[1]
    for form in ("onnx", "torch"):
        with pytest.raises(ValueError, match="float32, not in float16"):
            export_network(half, tmp_path / "new", form)
    assert not (tmp_path / "new").exists()


def test_what_can_not_be_written_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing was written"):
        export_network(piped(), tmp_path / "full", "torch")
    with pytest.raises(ValueError, match="did you mean 'onnx'"):
        export_network(piped(), tmp_path / "new", "onxx")
    with pytest.raises(ValueError, match="batch=0: expected"):
        export_network(piped(), tmp_path / "new", "torch", 0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'diffussm\[export\]'"):
        export_network(piped(), tmp_path / "new", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_command_writes_the_network_of_a_run(work, tmp_path):
    words = (
        f"export {work}/digits {tmp_path}/weights --format safetensors --dtype bfloat16"
    )
    assert "differs by" in diffussm(words + " --weights model --step 4")
    record = json.loads((tmp_path / "weights" / "export.json").read_text())
    assert record["training"]["weights"] == "model" and record["training"]["step"] == 4
    latents = f"export {work}/latent-run {tmp_path}/pipe"
    assert "say with --vae" in diffussm(latents, 1)
    diffussm(f"{latents} --vae {work}/vae")
    assert (tmp_path / "pipe" / "vae").is_dir()
    diffussm(f"export {work}/latent-run {tmp_path}/graph --format torch --batch 1")
    assert (tmp_path / "graph" / "denoiser.pt2").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{w}/digits {w}/images", "no empty folder"),
        ("{w}/images {t}/new", "not a training run"),
        ("{w}/digits {t}/new --step 3", "step 3"),
        ("{w}/digits {t}/new --format keras", "keras"),
        ("{w}/digits {t}/new --format onnx --dtype float16", "float32, not in float16"),
        ("{w}/digits {t}/new --batch 2", "--batch would have no effect"),
        ("{w}/digits {t}/new --format torch --batch 0", "--batch"),
        ("{w}/latent-run {t}/new --format torch --vae {w}/vae", "--vae would have no"),
        ("{w}/latent-run {t}/new --vae {w}/other", "made by the encoder of"),
    ],
)
def test_a_mistake_gets_a_sentence_and_writes_nothing(work, tmp_path, words, said):
    assert said in diffussm(f"export {words}", (1, 2), w=work, t=tmp_path)
    assert not list(tmp_path.iterdir())
