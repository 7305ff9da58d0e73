"""Where the time goes.

Generated from book/72_profiling.md by `make export`: edit there.
"""

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["time_by_kind"]


_FFT = "fft _forward_kernel _grad_u_kernel _grad_h_kernel"  # and ch. "GPU kernels"
_CHUNKS = "powers_kernel walk_kernel carry_kernel modes_kernel"  # of the chunks
_PRODUCTS = "::mm addmm bmm gemm cutlass nvjet xmma wgmma"
_KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "convolution": (*_FFT.split(), *_CHUNKS.split()),
    "matrix products": tuple(_PRODUCTS.split()),
}


def _kind(name: str) -> str:
    name = name.lower()
    for kind, words in _KINDS.items():
        if any(word in name for word in words):
            return kind
    return "other"


def time_by_kind(job: Callable[[], object]) -> dict[str, float]:
    """Where the time of one call of `job` goes, as PyTorch's profiler sees it.

    Returns:
        Seconds of "matrix products", "attention", "convolution" and "other": those of
        the kernels on a GPU, or of a job that launches none the operations on the CPU,
        each without those it calls.

    Source: ch. "Where the time goes".
    """
    seconds = _profiled(job, on_gpu=torch.cuda.is_available())
    return seconds if any(seconds.values()) else _profiled(job, on_gpu=False)


def _profiled(job: Callable[[], object], on_gpu: bool) -> dict[str, float]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is to be quiet
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as recorded:
        job()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = dict.fromkeys(
        ("matrix products", "attention", "convolution", "other"), 0.0
    )
    for event in recorded.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[_kind(event.key)] += own / 1e6
    return seconds
