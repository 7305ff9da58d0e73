"""Ch. "Where the time goes": a profile tells kinds of operations apart."""

import torch
from torch.nn import functional as F

from diffussm.profiling import time_by_kind


def test_a_profile_tells_kinds_apart():
    a, b = torch.randn(300, 300), torch.randn(3, 1, 2, 256, 32)
    jobs = {
        "matrix products": lambda: a @ a,
        "convolution": lambda: torch.fft.rfft(a),
        "attention": lambda: F.scaled_dot_product_attention(*b),
        "other": lambda: torch.exp(a).cumsum(0),
    }
    for kind, job in jobs.items():
        job()
        seconds = time_by_kind(job)
        assert set(seconds) == set(jobs) and max(seconds, key=seconds.get) == kind, (
            kind,
            seconds,
        )
