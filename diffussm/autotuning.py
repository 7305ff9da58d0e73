"""Chosen, not assumed.

Generated from book/74_autotuning.md by `make export`: edit there.
"""

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from diffussm.bidirectional import BidirectionalSSM, Convolution
from diffussm.chunked import modes
from diffussm.convolution import later
from diffussm.fft_convolution import FFT

__all__ = ["relative_errors", "Measured", "autotune_convolution"]


class _Case(NamedTuple):
    length: int
    d_model: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    d_state: int = 64


# A layer, u and the output's gradient.
_Problem = tuple[BidirectionalSSM, Tensor, Tensor | None]


def _problem(case: _Case, backward: bool = True) -> _Problem:
    L, D, B, device, dtype, d_state = case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = BidirectionalSSM(D, d_state).to(device)
    draws = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, dtype=dtype, generator=draws)
    u = draw(B, L, D)
    return layer, u, draw(B, L, 2 * D) if backward else None


_TOLERANCE = {"output": 1e-5, "grad_u": 1e-4, "grad_parameters": 1e-4}  # in float32


def _run(convolution: Convolution, problem: _Problem) -> dict[str, Tensor]:
    layer, u, grad = problem
    layer.convolution, u = convolution, u.detach().requires_grad_()
    y: Tensor = layer(u)
    inputs = dict(layer.named_parameters(prefix="grad")) | {"grad_u": u}
    gradients = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"output": y.detach(), **dict(zip(inputs, gradients, strict=True))}


def relative_errors(
    convolution: Convolution,
    length: int,
    d_model: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    d_state: int = 64,
) -> dict[str, float]:
    """How far a convolution is from float64: "output", "grad_u", "grad_parameters".

    Each is the largest difference relative to the largest entry, NaN if anything is
    not a number; the last that of the parameter in which it is largest.
    """
    case = _Case(length, d_model, batch, device, dtype, d_state)
    layer, u, grad = _problem(case)
    ours = _run(convolution, (layer, u, grad))
    true = _run(FFT, (layer.double(), u.double(), cast(Tensor, grad).double()))
    errors = {
        name: float((ours[name] - value).abs().max() / value.abs().max())
        for name, value in true.items()
    }
    own = {name: errors.pop(name) for name in ("output", "grad_u")}
    return own | {"grad_parameters": float(torch.tensor([*errors.values()]).max())}


def _allowed(dtype: torch.dtype, fft: dict[str, float]) -> dict[str, float]:
    if dtype == torch.float32:
        return _TOLERANCE
    return dict.fromkeys(_TOLERANCE, 3 * fft["output"])


_CHUNKS = (16, 4), (16, 8), (16, 16), (32, 8), (32, 16)  # positions at a time, warps


def _candidates(length: int) -> dict[str, Convolution]:
    from diffussm.gpu_kernels import LENGTHS, triton_convolve  # they need Triton

    found = {}
    for precision in ("tf32", "tf32x3") if length in LENGTHS else ():
        apply = partial(triton_convolve, precision=precision)
        name = f"on the chip, {precision}"
        found[name] = Convolution(apply, BidirectionalSSM.spectra)
    kernels = later("segments:chunked_triton")
    for chunk, warps in _CHUNKS:
        apply = partial(kernels, chunk=chunk, warps=warps)
        found[f"chunks of {chunk}, {warps} warps"] = Convolution(apply, modes, True)
    return found


def _right_ones(
    case: _Case,
) -> tuple[dict[str, Convolution], dict[str, dict[str, float]], list[str]]:
    """Those that may be timed, the errors of all, and why the others may not."""
    few = case._replace(d_model=min(case.d_model, 64), batch=min(case.batch, 17))
    errors = {"FFT": relative_errors(FFT, *few)}
    allowed = _allowed(case.dtype, errors["FFT"])
    right = {"FFT": FFT}
    faults = []
    for name, candidate in _candidates(case.length).items():
        try:
            found = errors[name] = relative_errors(candidate, *few)
        except Exception as error:  # Triton raises many kinds
            faults.append(f"{name}: {type(error).__name__}")
            continue
        wrong = {k: v for k, v in found.items() if not v <= allowed[k]}  # also NaN
        told = (f"{k} {v:.1e}, allowed {allowed[k]:.1e}" for k, v in wrong.items())
        if wrong:
            faults.append(f"{name}: errors: {'; '.join(told)}")
        else:
            right[name] = candidate
    return right, errors, faults


def _seconds(side: Convolution, problem: _Problem) -> float:
    """One forward pass, and a backward pass if asked for, from what is prepared."""
    layer, u, grad = problem
    prepared = side.prepare(layer, u.shape[1])
    leaves = [x.detach().requires_grad_(grad is not None) for x in (u, prepared)]
    wait = torch.cuda.synchronize if u.is_cuda else int
    wait()
    start = time.perf_counter()
    y = side(*leaves)
    if grad is not None:
        torch.autograd.grad(y, leaves, grad)
    wait()
    return time.perf_counter() - start


def _median_seconds(
    sides: dict[str, Convolution], problem: _Problem, runs: int = 5
) -> dict[str, float]:
    rounds = [
        {name: _seconds(side, problem) for name, side in sides.items()}
        for _ in range(runs + 1)
    ]
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in sides}


@dataclass(frozen=True)
class Measured:
    """Which convolution to use on a machine, and why.

    Attributes:
        convolution: For `block.ssm.convolution`.
        reason: A sentence for the log.
        seconds: Of what was timed, by name.
        errors: Of what was compared, by name; see `relative_errors`.
    """

    convolution: Convolution
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def _try_all(case: _Case, backward: bool = True) -> Measured:
    try:
        right, errors, faults = _right_ones(case)
        problem = _problem(case, backward)
        seconds = _median_seconds(right, problem)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return Measured(FFT, f"FFT: trying the others failed ({why})")
    name = min(seconds, key=lambda key: seconds[key])
    times = ", ".join(f"{key} {1e3 * value:.2f} ms" for key, value in seconds.items())
    reason = f"{name}: {'; '.join([times, *faults])}"
    return Measured(right[name], reason, seconds, errors)


def autotune_convolution(
    length: int,
    d_model: int,
    batch: int,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    d_state: int = 64,
    backward: bool = True,
) -> Measured:
    """The fastest convolution that is right on this machine: run, compared and timed.

    Args:
        length: L.
        d_model: D.
        batch: Images that one process takes through the network at once.
        device: Where; anything but a GPU stays with the FFT.
        dtype: Of the input of the convolution, bfloat16 under autocast.
        d_state: N, on which the work of the chunks depends.
        backward: Whether the backward pass is timed as well.

    Source: ch. "Chosen, not assumed".
    """
    device = torch.device(device)
    if device.type != "cuda":
        why = f"the kernels on the chip are for a GPU, and this is a {device.type}"
        return Measured(FFT, f"FFT: {why}")
    case = _Case(length, d_model, batch, device, dtype, d_state)
    return _try_all(case, backward)
