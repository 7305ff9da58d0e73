"""What ``benchmarks/gpu.sh`` recorded, for the pages that read it.

A record is of one GPU, whichever it was, and may lack any section, row or figure: one
section was run, memory did not suffice, runs were noisy. So a page takes what is there
and writes a sentence where it has the figures.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from IPython.display import Markdown, display

from diffussm.efficiency import diffussm_macs, dit_macs
from diffussm.model_config import DiffuSSMConfig

__all__ = [
    "Gpu",
    "gpus",
    "listed",
    "on_blocks",
    "on_training",
    "paragraphs",
    "rows_of",
    "trained_on",
    "way_of",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """A GPU and what was measured on it.

    Attributes:
        name: "H100"; with the file where another record is of such a GPU too.
        file: Where its record is stored.
        record: What the file holds.
    """

    name: str
    file: str
    record: dict[str, Any]

    @property
    def where(self) -> str:
        """The GPU as it calls itself, the version of PyTorch and the date."""
        said = self.record["environment"]
        version = said["torch"].partition("+")[0]
        return f"{said['gpu']}, PyTorch {version}, {said['date']}"

    def rows(self, section: str, *needed: str, **wanted: Any) -> list[Row]:
        """The rows of a section with what is needed, and as they are wanted; a ratio is
        that of the medians, not rounded.
        """
        return [
            row | _exact(row)
            for row in self.record.get(section, [])
            if all(row.get(key) is not None for key in needed)
            and all(row.get(key) == value for key, value in wanted.items())
        ]

    def row(self, section: str, *needed: str, **wanted: Any) -> Row:
        """The first of these rows, or nothing."""
        return next(iter(self.rows(section, *needed, **wanted)), {})


def _exact(row: Row) -> Row:
    """The ratio of a row, from the medians of the two sides that it compares."""
    if not {"ratio", "seconds"} <= set(row):
        return {}
    slow, fast = (statistics.median(times) for times in row["seconds"].values())
    return {"ratio": slow / fast}


def gpus(records: dict[str, Any]) -> list[Gpu]:
    """The GPUs of these records, by the names of their files."""
    found = {file: record for file, record in records.items() if record}
    names = {file: _short(one["environment"]["gpu"]) for file, one in found.items()}
    many = Counter(names.values())
    for file, name in names.items():
        names[file] = name if many[name] == 1 else f"{name} of {file}.json"
    return [Gpu(names[file], f"{file}.json", record) for file, record in found.items()]


def _short(name: str) -> str:
    """ "H100" of "NVIDIA H100 80GB HBM3": the first word with a digit."""
    words = re.split(r"[\s-]+", name)
    return next((word for word in words if re.search(r"\d", word)), name)


def way_of(row: Row) -> str:
    """How the layer of a row was run: "FFT", "chunks" or "four steps"."""
    told = row.get("convolution", "FFT")  # where nothing is said there was no choice
    if "chunk" in told:
        return "chunks"
    return "four steps" if told == "triton" or "on the chip" in told else "FFT"


def listed(values: Iterable[object], form: str = "{}") -> str:
    """Such as "0.62, 0.89 and 1.36"."""
    *first, last = (form.format(value) for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def paragraphs(texts: Iterable[str]) -> None:
    """Show texts that a record has made as those of the page."""
    display(Markdown("\n\n".join(texts)))


def rows_of(
    card: Gpu, section: str, way: str, *needed: str, **wanted: Any
) -> list[Row]:
    """The rows of a section whose layer was run this way."""
    rows = card.rows(section, *needed, **wanted)
    return [row for row in rows if way_of(row) == way]


def on_blocks(card: Gpu, way: str) -> str:
    """The blocks of one GPU, in a sentence or two; nothing where none was measured."""
    wanted = {"attention": "fused attention"}
    rows = rows_of(card, "blocks", way, "ratio", **wanted)
    if not rows:
        return ""
    ratios = listed((row["ratio"] for row in rows), "{:.2f}")
    apart = listed((100 * row["spread"] for row in rows), "{:.1f}")
    said = f"The compiled block is {ratios} times as fast as DiT's with fused "
    said += f"attention at L = {listed(row['length'] for row in rows)}. The two sides "
    said += "took turns, and the middle half of the runs of a side is at most "
    said += f"{apart} percent of its median wide."
    speeds = [_teraflops(row) for row in rows if "batch" in row]
    if len(speeds) == len(rows):
        ours, theirs = (listed(side, "{:.0f}") for side in zip(*speeds, strict=True))
        said += f" It does {ours} Tflop/s there, DiT's {theirs}"
        plain = [row["product_tflops"] for row in rows if "product_tflops" in row]
        said += f" and a plain product {max(plain):.0f}." if plain else "."
    if way == "chunks" and not all("passes" in row for row in rows):
        said += " What the layer needs of the weights was ready before, and is not in "
        said += "these times."
    return said


def _teraflops(row: Row) -> tuple[float, float]:
    """What our block and DiT's do in a second: two operations for each multiply-add,
    the backward pass twice the forward pass; without those of the layer, whichever way
    it is run.
    """
    config = DiffuSSMConfig(8, d_model=1152, n_blocks=1)
    work = 6e-12 * row["batch"] * row.get("passes", 1)
    speeds = []
    for name, count in (("DiffuSSM", diffussm_macs), ("DiT", dit_macs)):
        every = count(config, row["length"]).items()
        macs = sum(n for name, n in every if name not in ("convolution", "kernels"))
        speeds.append(work * macs / statistics.median(row["seconds"][name]))
    return speeds[0], speeds[1]


def on_training(card: Gpu, way: str, length: int) -> str:
    """Training at one length, in some sentences; nothing where it was not measured."""
    wanted = {"length": length, "patch": 1}
    ours = rows_of(
        card, "training", way, "images_per_second", kind="DiffuSSM", **wanted
    )
    theirs = card.rows("training", "images_per_second", kind="DiT", **wanted)
    if not ours:
        return ""
    best = max(ours, key=lambda row: row["images_per_second"])
    rate, batch = best["images_per_second"], best["batch"]
    said = f"At full depth and L = {length} XL trains on {rate:.0f} images a second "
    said += f"with a batch of {batch}"
    if theirs:
        other = max(theirs, key=lambda row: row["images_per_second"])
        times = rate / other["images_per_second"]
        said += f", {times:.2f} times as many as DiT-XL at equal length with one of "
        said += f"{other['batch']}: the best batch of each, not measured in turns"
    said += "."
    shared = {row["batch"]: row for row in theirs}
    for row in reversed(ours):
        if row["batch"] in shared and row.get("peak_bytes"):
            sizes = [r["peak_bytes"] / 2**30 for r in (row, shared[row["batch"]])]
            said += f" {row['batch']} images take {sizes[0]:.0f} GiB at the peak, with "
            said += f"DiT-XL {sizes[1]:.0f}."
            break
    return said + _on_mfu(ours, theirs)


def _on_mfu(ours: list[Row], theirs: list[Row]) -> str:
    """What share of the peak was reached, and what is in its way."""
    ours, theirs = ([r for r in rows if "mfu" in r] for rows in (ours, theirs))
    if not ours:
        return ""
    shares = listed((row["mfu"] for row in ours), "{:.2f}")
    said = f" Its MFU is {shares} with {listed(row['batch'] for row in ours)} images"
    if theirs:
        best = max(theirs, key=lambda row: row["mfu"])
        said += f" (DiT-XL: {best['mfu']:.2f} with {best['batch']})"
    best = max(ours, key=lambda row: row["mfu"])
    parts, step = best["profile"], statistics.median(best["seconds"])
    busy, layers = sum(parts.values()), parts.get("convolution", parts.get("FFT", 0))
    products = busy * (1 - best["share_outside"])
    bound, rest = best["mfu"] * step / products, busy - layers - products
    said += f". Matrix products alone would bring {bound:.2f}: the kernels of the "
    said += f"convolution take {layers / busy:.0%} of the GPU's time, and others that "
    said += f"are no products {rest / busy:.0%}. All kernels together take "
    return said + f"{busy:.2f} s, and a step {step:.2f} s."


def trained_on(card: Gpu) -> Iterator[tuple[str, ...]]:
    """A row for each network, size and way that was trained with there: GPU, network,
    way, latent, best images/s and batch, best MFU, memory of the largest batch.
    """
    networks = ("DiffuSSM", 1), ("DiT", 1), ("DiT", 2)
    for size, (kind, patch) in product((32, 64), networks):
        wanted = {"size": size, "kind": kind, "patch": patch}
        found = card.rows("training", "images_per_second", **wanted)
        for way in dict.fromkeys(map(way_of, found)):
            rows = [row for row in found if way_of(row) == way]
            best = max(rows, key=lambda row: row["images_per_second"])
            mfu = max(row.get("mfu", 0.0) for row in rows)
            memory = max(row.get("peak_bytes") or 0 for row in rows) / 2**30
            yield (
                card.name,
                f"{kind}-XL{'/2' if patch == 2 else ''}",
                way if kind == "DiffuSSM" else "–",
                f"{size} × {size}, L = {best['length']}",
                f"{best['images_per_second']:.1f}, {best['batch']}",
                f"{mfu:.1%}" if mfu else "–",
                f"{memory:.1f} GiB" if memory else "–",
            )
