"""What a small network learns from six initial spectra, on digits in a row.

Command: ``python -m benchmarks.choice``.

The chapter *Does the choice matter?* defines the network and how it is trained, in its
cells tagged `experiment`; here they run longer than a page may. The sides of a seed
differ in the eigenvalues that training starts from and in nothing else.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.common import report
from diffussm.convolution import S4DKernel, fft_conv
from diffussm.data import batch_indices, digits
from diffussm.state_space import s4d_inv, s4d_legs, s4d_lin
from tools.book import ROOT, read_chapter

PAGE = ROOT / "book" / "39_does_the_choice_matter.md"
USED = (
    torch,
    nn,
    S4DKernel,
    fft_conv,
    batch_indices,
    digits,
    s4d_inv,
    s4d_legs,
    s4d_lin,
)


def experiment() -> dict[str, Any]:
    """The names that the page's cells define."""
    space: dict[str, Any] = {thing.__name__.split(".")[-1]: thing for thing in USED}
    for cell in read_chapter(PAGE).cells:
        if "experiment" in cell.tags:
            exec(compile(cell.source, str(PAGE), "exec"), space)
    return space


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choice", description=(__doc__ or "").splitlines()[0]
    )
    for name, default, what in (
        ("--seeds", 3, "how many times, with other weights and another order"),
        ("--steps", 300, "steps of training, 64 digits each"),
        ("--every", 30, "steps between two looks at the digits held back"),
    ):
        text = f"{what} (default: {default})"
        parser.add_argument(name, type=int, default=default, help=text)
    arguments = parser.parse_args(argv)
    if min(arguments.seeds, arguments.steps, arguments.every) < 1:
        parser.error("all options must be positive")
    torch.set_num_threads(1)
    page, how = experiment(), (arguments.steps, arguments.every)
    rows = []
    for name, start in page["STARTS"].items():
        seeds = range(arguments.seeds)
        curves = [page["learn"](start(seed), seed, *how) for seed in seeds]
        last = [curve[-1] for curve in curves]
        percent = {f"seed {seed}": f"{value:.1f} %" for seed, value in enumerate(last)}
        mean = {"mean": f"{statistics.mean(last):.1f} %"}
        rows.append({"start": name, **percent, **mean, "curves": curves})
        print(name, *percent.values(), flush=True)
    count = len(page["in_a_row"]("test")[1])
    title = f"Digits named rightly after {arguments.steps} steps, of {count} held back"
    return report("choice", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
