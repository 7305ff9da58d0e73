"""Exporting: a graph for other programs.

Generated from book/63_exporting.md by `make export`: edit there.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffussm.bidirectional import BidirectionalSSM
from diffussm.denoiser import Denoiser
from diffussm.files import whole_folder, write_json
from diffussm.guards import expect, expect_empty, expect_one_of, explain, refuse
from diffussm.model import DiffuSSM
from diffussm.one_file import COMPONENT_FILE, self_contained_code
from diffussm.pipeline import DiffuSSMPipeline
from diffussm.schedulers import ancestral_scheduler

__all__ = [
    "DepthwiseSSM",
    "fixed_length",
    "traced",
    "Network",
    "export_network",
    "check_target",
]


class DepthwiseSSM(nn.Module):
    """A `BidirectionalSSM` for one length, with constants for kernels and no transform.

    Source: ch. "Exporting: a graph for other programs", eq-exporting-depthwise.
    """

    past: Tensor
    future: Tensor

    @torch.no_grad()
    def __init__(self, ssm: BidirectionalSSM, length: int) -> None:
        super().__init__()
        past, future = ssm.forward_kernel(length), ssm.backward_kernel(length)  # (D, L)
        for kernel, skip in zip((past, future), ssm.skip.chunk(2), strict=True):
            kernel[:, 0] += skip
        self.register_buffer("past", past.flip(1).unsqueeze(1))  # (D, 1, L)
        self.register_buffer("future", future.unsqueeze(1).clone())

    def forward(self, u: Tensor, prepared: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, 2D); `prepared` is not needed."""
        D, _, L = self.past.shape
        expect("u", u, "B L D", L=L, D=D)
        u = u.transpose(1, 2)  # (B, D, L)
        past = F.conv1d(F.pad(u, (L - 1, 0)), self.past, groups=D)
        future = F.conv1d(F.pad(u, (0, L - 1)), self.future, groups=D)
        return torch.cat([past, future], dim=1).transpose(1, 2)  # (B, L, 2D)


def fixed_length(model: DiffuSSM) -> DiffuSSM:
    """The same network, for images of the size in its configuration only."""
    same, length = Denoiser.of(model), model.config.seq_len
    blocks: Any = same.blocks
    for block in blocks:
        block.ssm = DepthwiseSSM(block.ssm, length)
    return same


_NAMES = ("x", "t", "y")


def _inputs(model: DiffuSSM, batch: int) -> tuple[Tensor, ...]:
    """Something to try a network with: x, t and, if it knows classes, y."""
    config, generator = model.config, torch.Generator().manual_seed(batch)
    size = batch, config.in_channels, config.height, config.width
    x = torch.randn(size, generator=generator)  # (B, C, H, W)
    t = 1000 * torch.rand(batch, generator=generator)  # (B,)
    y = torch.randint(config.num_classes + 1, (batch,), generator=generator)
    return (x, t, y) if config.num_classes else (x, t)


def _shapes(count: int, batch: int | str) -> tuple[Any, ...]:
    """What of the inputs' shapes is a symbol."""
    free = {0: torch.export.Dim("batch")} if batch == "dynamic" else {}
    return (free,) * count


def traced(
    model: DiffuSSM, batch: int | str = "dynamic"
) -> torch.export.ExportedProgram:
    """The graph (x, t, y) -> (B, 2C, H, W) of a network, its kernels constants.

    `batch` is the number of images, or "dynamic": any.
    """
    inputs = _inputs(model, 2 if batch == "dynamic" else int(batch))
    shapes = _shapes(len(inputs), batch)
    with torch.no_grad():
        network = fixed_length(model)
        return torch.export.export(network, inputs, dynamic_shapes=shapes)


Network = Callable[..., Tensor]  # (x, t, y) -> (B, 2C, H, W)


def _write_torch(pipe: Any, folder: Path, name: str, batch: int | str) -> Network:
    path = folder / "denoiser.pt2"
    torch.export.save(traced(pipe.denoiser, batch), path)
    read: Network = torch.export.load(path).module()
    return read


def _write_onnx(pipe: Any, folder: Path, name: str, batch: int | str) -> Network:
    runtime, program = _onnx_runtime(), traced(pipe.denoiser, batch)
    path, names = folder / "denoiser.onnx", _NAMES[: _count(pipe)]
    how: Any = {"input_names": names, "output_names": ["output"], "verbose": False}
    made: Any = torch.onnx.export(program, dynamo=True, **how)
    made.save(path)  # what goes beyond 2 GB, beside it
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def read(*inputs: Tensor) -> Tensor:
        given = {k: v.numpy() for k, v in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return read


def _count(pipe: Any) -> int:
    """How many inputs the network has."""
    return 3 if pipe.denoiser.config.num_classes else 2


def _onnx_runtime() -> Any:
    """ONNX Runtime; ValueError if it, or what writes ONNX, is not installed."""
    with explain("onnx: pip install 'diffussm[export]'", ImportError):
        importlib.import_module("onnxscript")
        return importlib.import_module("onnxruntime")


def _write_weights(pipe: Any, folder: Path, name: str, batch: int | str) -> Network:
    pipe.denoiser.save_pretrained(folder)
    code = self_contained_code("model", "DiffuSSM")
    (folder / COMPONENT_FILE).write_text(code, encoding="utf-8")
    return DiffuSSM.from_pretrained(folder).eval()


def _write_pipeline(pipe: Any, folder: Path, name: str, batch: int | str) -> Network:
    pipe.save_pretrained(folder, name=name)
    read: Network = DiffuSSMPipeline.from_pretrained(folder).denoiser
    return read


_FORMATS = {
    "pipeline": _write_pipeline,
    "safetensors": _write_weights,
    "onnx": _write_onnx,
    "torch": _write_torch,
}
_GRAPHS = ("onnx", "torch")
_TOLERANCE = 1e-4  # of the largest output


@torch.no_grad()
def _difference(read: Network, pipe: Any, batch: int | str) -> float:
    """The largest difference of what was read, as a share of the largest output."""
    model, shares = pipe.denoiser, []
    if model.dtype != torch.float32:  # the weights are rounded, the sums are not
        model = copy.deepcopy(model).float()
    for count in (1, 3) if batch == "dynamic" else (int(batch),):
        inputs = _inputs(model, count)
        expected, found = model(*inputs), read(*inputs)  # (B, 2C, H, W)
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        shares.append((found - expected).abs().max() / scale)
    return torch.stack(shares).max().item()  # not a number if one of them is none


def export_network(
    pipe: Any, folder: Path, format: str = "pipeline", batch: int | str = "dynamic"
) -> float:
    """Write a `DiffuSSMPipeline`, or its network alone, and compare what was written.

    Args:
        pipe: the pipeline, on the CPU; weights and pipelines keep its precision.
        folder: must not exist, or be empty. It appears complete or not at all.
        format: pipeline, safetensors, onnx or torch; a graph is of float32 and for one
            size of images.
        batch: images at once in a graph, a number or "dynamic".

    Returns:
        The largest difference from the network, as a share of its largest output.

    Raises:
        FileExistsError: the folder holds something; nothing is written.
        ValueError: half precision for a graph, a package that is missing, or a
            difference above 1e-4.
    """
    write = _FORMATS[expect_one_of("format", format, _FORMATS)]
    check_target(folder, format, str(pipe.denoiser.dtype).removeprefix("torch."))
    refuse(batch != "dynamic" and int(batch) < 1, f"batch={batch}: expected 1 or more")
    with whole_folder(folder) as draft:
        read = write(pipe, draft, folder.resolve().name, batch)
        difference = _difference(read, pipe, batch)
        far = f"what was written as {format} differs by {difference:.1e} of the largest"
        advice = f"expected {_TOLERANCE:.0e} at most, so {folder} was not kept"
        refuse(not difference <= _TOLERANCE, f"{far} output; {advice}")
        if format != "pipeline":  # which has a card
            _describe(pipe, draft, folder.resolve().name, format, batch, difference)
    return difference


def check_target(folder: Path, format: str, dtype: str) -> None:
    """What can be refused before a network is loaded."""
    expect_empty(folder)
    half = format in _GRAPHS and dtype != "float32"
    refuse(half, f"{format} is written in float32, not in {dtype}")
    if format == "onnx":
        _onnx_runtime()


_README = """\
# {name}

The denoiser of a diffusion model without attention (DiffuSSM), as {what}.

{fence}python
{load}
{fence}

| | shape | |
|---|---|---|
| `x` | ({B}, {C}, {H}, {W}) float32 | what the chain holds: {unit}, with noise |
| `t` | ({B},) float32 | timestep, 0 to {last} |
{labels}| output | ({B}, {twice}, {H}, {W}) float32 | noise, and place of the variance |

The scheduler is not inside. The network was trained on a linear schedule of {T} steps,
beta from {first:g} to {end:g}, and predicts the noise in its first {C} channels; in the
others where the variance lies between its bounds. In diffusers that is
`DDPMScheduler({T}, {first}, {end}, variance_type="learned_range",
clip_sample=False, timestep_spacing="linspace")`.
{guidance}`export.json` has the sizes, the names of the classes and what is known of the
training.

Compared with PyTorch after it was written, the largest difference is {difference:.1e}
of the largest output.
"""

_WHAT = {
    "safetensors": f"weights for PyTorch, with its code in `{COMPONENT_FILE}`",
    "onnx": "a graph in ONNX, for one size of images",
    "torch": "a graph of `torch.export`, for one size of images",
}
_LOAD = {
    "safetensors": """\
import torch
from modeling_diffussm import DiffuSSM
denoiser = DiffuSSM.from_pretrained(".").eval()
inputs = torch.randn({B}, {C}, {H}, {W}), torch.full(({B},), {last}.0){y_torch}
output = denoiser(*inputs)""",
    "torch": """\
import torch
denoiser = torch.export.load("denoiser.pt2").module()
inputs = torch.randn({B}, {C}, {H}, {W}), torch.full(({B},), {last}.0){y_torch}
output = denoiser(*inputs)""",
    "onnx": """\
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("denoiser.onnx")
x = np.random.randn({B}, {C}, {H}, {W}).astype("float32")
inputs = {{"x": x, "t": np.full({B}, {last}, "float32"){y_numpy}}}
output = session.run(None, inputs)[0]""",
}
_Y = {
    "y_torch": ", torch.zeros({B}, dtype=int)",
    "y_numpy": ', "y": np.zeros({B}, int)',
}
_GUIDANCE = """\
For classifier-free guidance call it with `y` and with {K}; the guided noise is the
second answer, plus the scale times the difference of the first from it.
"""


def _words(pipe: Any, batch: int | str) -> dict[str, Any]:
    """What the page says of a network."""
    config, T = pipe.denoiser.config, pipe.config.num_train_timesteps
    C, K, schedule = config.in_channels, config.num_classes, ancestral_scheduler(T)
    many = "B" if batch == "dynamic" else batch
    label = f"| `y` | ({many},) int64 | class, 0 to {K - 1}; {K} for none |\n"
    return {
        "fence": "`" * 3,
        "C": C,
        "H": config.height,
        "W": config.width,
        "twice": 2 * C,
        "T": T,
        "last": T - 1,
        "first": schedule.config.beta_start,
        "end": schedule.config.beta_end,
        "B": many,
        "unit": "pixels from -1 to 1" if C in (1, 3) else "latents as in training",
        "labels": label if K else "",
        "guidance": _GUIDANCE.format(K=K) if K else "",
    }


def _describe(
    pipe: Any, folder: Path, name: str, format: str, batch: int | str, found: float
) -> None:
    """Write the page, and the facts for a program to read."""
    words = _words(pipe, batch)
    one = {**words, "B": 1 if batch == "dynamic" else batch}
    for key, text in _Y.items():
        one[key] = text.format(**one) if words["labels"] else ""
    words |= {"what": _WHAT[format], "load": _LOAD[format].format(**one)}
    text = _README.format(name=name, difference=found, **words)
    (folder / "README.md").write_text(text, encoding="utf-8")
    facts: dict[str, Any] = {"format": format, "batch": batch, "difference": found}
    facts["model"] = asdict(pipe.denoiser.config)
    for key in ("num_train_timesteps", "id2label", "training"):
        facts[key] = pipe.config[key]
    write_json(folder / "export.json", facts)
