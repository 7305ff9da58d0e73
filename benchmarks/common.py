"""What the benchmarks share: fair timing, honest memory, a report that cannot flatter.

A ratio is only as good as its two sides, so

- both sides run in one process, alternating, and each is summed up by its median
  (`alternate`);
- the two results are compared before anything is reported (`require_agreement`);
- runs that differ too much among themselves are not reported either
  (`require_quiet`);
- peak memory is taken in a fresh process for each side (`peak_memory`);
- the report names the processor, the thread count and the versions, as Markdown and as
  JSON (`report`).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


NOISE = (
    0.2  # of the median: how far apart the quartiles of the runs of one side may lie
)


class Noise(RuntimeError):
    """The runs of one side differ so much among themselves that their median says
    little.
    """


class Disagreement(RuntimeError):
    """The two sides of a comparison do not compute the same thing, so their speeds must
    not be compared.
    """


def require_agreement(
    what: str,
    reference: Tensor | Iterable[Tensor],
    candidate: Tensor | Iterable[Tensor],
    tolerance: float,
) -> float:
    """Largest difference relative to the reference's largest entry, over all tensors
    given.

    Raises Disagreement when shapes differ, when anything is not finite, or when the
    difference exceeds
    ``tolerance``.
    """
    pairs = [
        [tensors] if isinstance(tensors, Tensor) else list(tensors)
        for tensors in (reference, candidate)
    ]
    if len(pairs[0]) != len(pairs[1]):
        raise Disagreement(
            f"{what}: {len(pairs[0])} tensors against {len(pairs[1])}; nothing is "
            "reported"
        )
    worst = 0.0
    for index, (a, b) in enumerate(zip(*pairs, strict=True)):
        if a.shape != b.shape:
            raise Disagreement(
                f"{what}: tensor {index} has shape {tuple(a.shape)} against "
                f"{tuple(b.shape)}"
            )
        wide = torch.promote_types(a.dtype, torch.float64)  # complex stays complex
        a, b = a.detach().to(wide), b.detach().to(wide)
        error = float(
            (a - b).abs().max()
            / a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        )
        if not error <= tolerance:  # also catches NaN
            raise Disagreement(
                f"{what}: the two sides differ by {error:.1e} of the largest entry "
                f"(tensor {index}), "
                f"more than the {tolerance:.0e} allowed; nothing is reported"
            )
        worst = max(worst, error)
    return worst


def alternate(
    sides: Mapping[str, Callable[[], object]], *, runs: int = 3, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run of each side, taken in turns so that a slow moment hits all
    sides.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(-warmup, runs):
        for name, side in sides.items():
            gc.collect()
            _synchronize()
            start = time.perf_counter()
            result = side()
            _synchronize()
            elapsed = time.perf_counter() - start
            del result
            if run >= 0:
                seconds[name].append(elapsed)
    return seconds


def keep_freed_memory() -> None:
    """Let glibc keep the pages of freed tensors, as the caching allocator of a GPU
    does.

    By default each tensor of more than 32 MiB is mapped afresh and filled with zeros by
    the system, page by page: a cost that falls on whichever side makes the larger
    tensors (here DiT's), not on what they compute. Elsewhere than on glibc this does
    nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    for option, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 2**28)):
        mallopt(option, value)


def require_quiet(what: str, seconds: Mapping[str, list[float]]) -> float:
    """The largest distance between the quartiles of a side's runs, relative to its
    median.

    Raises Noise where it exceeds NOISE: something else was running, and a ratio of such
    medians is luck. One run has no spread: ValueError.
    """
    worst = 0.0
    for name, values in seconds.items():
        if len(values) < 2:
            raise ValueError(f"{what}: {name} ran once, and one run has no spread")
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        spread = (high - low) / statistics.median(values)
        if not spread <= NOISE:
            runs = ", ".join(f"{value:.3g}" for value in values)
            raise Noise(
                f"{what}: the runs of {name} took {runs} s; their quartiles lie "
                f"{spread:.0%} of the median "
                f"apart, more than the {NOISE:.0%} allowed; nothing is reported. "
                "Close what else is running, "
                "or raise --runs"
            )
        worst = max(worst, spread)
    return worst


def quiet_runs(
    what: str,
    sides: Mapping[str, Callable[[], object]],
    *,
    runs: int = 3,
    warmup: int = 1,
    tries: int = 3,
) -> tuple[dict[str, list[float]], float]:
    """What `alternate` returns and its spread; a noisy round is measured again
    before it is refused.
    """
    for left in reversed(range(tries)):
        seconds = alternate(sides, runs=runs, warmup=warmup)
        try:
            return seconds, require_quiet(what, seconds)
        except Noise:
            if not left:
                raise
    raise AssertionError("tries must be at least 1")


def speed_row(
    what: str,
    reference: tuple[str, Callable[[], object]],
    candidate: tuple[str, Callable[[], object]],
    *,
    at_least: float,
    runs: int = 3,
    warmup: int = 1,
) -> dict[str, Any]:
    """One row of the report: how many times faster ``candidate`` is (each side a
    ``(name, function)``).
    """
    seconds, spread = quiet_runs(
        what, dict([reference, candidate]), runs=runs, warmup=warmup
    )
    slow, fast = (
        statistics.median(seconds[name]) for name, _ in (reference, candidate)
    )
    return {
        "what": what,
        reference[0]: f"{1e3 * slow:,.1f} ms",
        candidate[0]: f"{1e3 * fast:,.1f} ms",
        "ratio": rounded(slow / fast, at_least),
        "limit": f"at least {at_least:g}",
        "reached": slow / fast >= at_least,
        "spread": f"{spread:.0%}",
        "seconds": seconds,
    }


def plain_product(side: int, bf16: bool = False) -> tuple[Callable[[], object], float]:
    """A product of two square matrices, by which to judge the sides of a comparison,
    and its operations.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    square = torch.randn(side, side, dtype=dtype)
    return lambda: square @ square, 2.0 * side**3


def rounded(value: float, limit: float | None = None, digits: int = 2) -> float:
    """To two digits, or to as many as tell a value from a limit."""
    while round(value, digits) == limit != value and digits < 9:
        digits += 1
    return round(value, digits)


def share_outside(seconds: Mapping[str, float]) -> float:
    """The share of a job, in seconds by kind, that is no matrix product or attention.

    Kinds are those of `diffussm.profiling.time_by_kind`, perhaps divided further.
    """
    inside = ("matrix products", "attention")
    products = sum(s for kind, s in seconds.items() if kind.endswith(inside))
    return 1 - products / sum(seconds.values())


def peak_memory(function: str, *arguments: object) -> int:
    """Bytes by which a job raised the resident memory of its process, at the peak.

    ``function`` is "package.module:name". It is called in a fresh process (so that
    neither side inherits the other's pages) and returns the job to measure as a
    callable: whatever that factory builds, inputs included, counts as already there.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure_peak, args=(send, function, arguments, torch.get_num_threads())
    )
    process.start()
    send.close()
    try:
        peak = receive.recv()
    except EOFError:
        peak = None
    process.join()
    if peak is None or process.exitcode != 0:
        raise RuntimeError(
            f"measuring the memory of {function}{arguments} failed (exit code "
            f"{process.exitcode})"
        )
    return peak


def memory_row(
    what: str,
    reference: tuple[str, int],
    candidate: tuple[str, int],
    *,
    at_least: float,
) -> dict[str, Any]:
    """One row of the report: how many times less memory ``candidate`` needs (each
    ``(name, bytes)``).
    """
    ratio = reference[1] / max(candidate[1], 1)
    return {
        "what": what,
        reference[0]: f"{reference[1] / 2**20:,.0f} MiB",
        candidate[0]: f"{candidate[1] / 2**20:,.0f} MiB",
        "ratio": rounded(ratio, at_least),
        "limit": f"at least {at_least:g}",
        "reached": ratio >= at_least,
        "bytes": {reference[0]: reference[1], candidate[0]: candidate[1]},
    }


def report(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    by: str = "",
) -> int:
    """Print the rows as a Markdown table, write ``results/<name>.json`` and ``.md``,
    return the exit status. ``by`` is the command if it is not called like the report.

    A row is a mapping from column to text or number; lists and mappings go to the JSON
    only. A row whose
    ``reached`` is false makes the exit status 1.
    """
    if not rows:
        raise ValueError(f"benchmark {name!r} measured nothing: pass at least one row")
    columns = [
        key for key, value in rows[0].items() if not isinstance(value, dict | list)
    ]
    lines = [
        f"## {title}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        values = [row.get(column, "") for column in columns]
        cells = [
            {True: "yes", False: "**no**"}[v] if isinstance(v, bool) else str(v)
            for v in values
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = environment()
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines += ["", f"{facts}; `python -m benchmarks.{by or name}`"]
    markdown = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown)
    record = {
        "title": title,
        "settings": dict(settings or {}),
        "environment": machine,
        "rows": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(markdown)
    return 0 if all(row.get("reached", True) for row in rows) else 1


def two_or_more(text: str) -> int:
    """The type of ``--runs`` wherever a spread is reported."""
    runs = int(text)
    if runs < 2:
        raise argparse.ArgumentTypeError(
            f"{runs}: one run has no spread, take 2 or more"
        )
    return runs


def asked_runs(
    module: str,
    told: str | None,
    argv: list[str] | None,
    default: int = 5,
    what: str = "timed runs of each side",
    kind: Callable[[str], int] = two_or_more,
) -> int:
    """The one option of a benchmark without any other: ``--runs``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=(told or "").splitlines()[0]
    )
    text = f"{what} (default: {default})"
    parser.add_argument("--runs", type=kind, default=default, help=text)
    runs: int = parser.parse_args(argv).runs
    if runs < 1:
        parser.error("--runs must be positive")
    return runs


def command(main: Callable[[], int]) -> int:
    """Run a benchmark's main; a comparison that must not be reported ends with its
    reason, no traceback.
    """
    try:
        return main()
    except (Disagreement, Noise) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def instructions() -> str:
    """The widest vectors that PyTorch uses here, and products of bfloat16 if any."""
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{flags}, bfloat16" if _multiplies_bf16() else flags


def _multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 by itself, as Linux says it."""
    with suppress(OSError):
        known = set(Path("/proc/cpuinfo").read_text().split())
        return bool(known & {"avx512_bf16", "amx_bf16"})
    return False


def environment() -> dict[str, str]:
    """What a reader needs to judge a number: processor, threads, versions (and the GPU
    if there is one).
    """
    from diffussm.resources import processor  # here, for it costs seconds

    machine = {
        "processor": processor(),
        "instructions": instructions(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measure_peak(
    send: Any, function: str, arguments: tuple[object, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    module, _, attribute = function.partition(":")
    job = getattr(importlib.import_module(module), attribute)(*arguments)
    gc.collect()
    # glibc: pages of freed tensors that the process still holds must not count as
    # already there
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
    try:  # Linux: forget the high-water mark left behind by the imports
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    before = _resident("VmRSS")
    result = job()
    send.send(_resident("VmHWM") - before)
    del result
    send.close()


def _resident(field: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most so far (VmHWM; without
    /proc always this).
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
