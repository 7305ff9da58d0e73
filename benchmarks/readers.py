"""Readers of a latent store on a far disk: ``python -m benchmarks.readers``.

The disk is a stub that answers each read after `DELAY` seconds, as one on a network
does. One thread asks for one latent after another, several wait together. Both get the
same moments; the ratio is what threads are worth where waiting is all that costs.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import asked_runs, command, report, require_agreement, speed_row
from benchmarks.loader import write_both
from diffussm.data import batch_flips, batch_indices
from diffussm.latents import LatentStore

BATCH, DELAY, THREADS = 64, 0.005, (4, 8)


class FarStore(LatentStore):
    """A latent store on a disk that is far away."""

    def read(self, number: int, record: int) -> np.ndarray:
        """The same, after a while."""
        time.sleep(DELAY)
        return super().read(number, record)


def main(argv: list[str] | None = None) -> int:
    runs = asked_runs("readers", __doc__, argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = FarStore(write_both(Path(folder), 32, 2 * BATCH)[0].path)
        where = (
            batch_indices(len(store), BATCH, 0, 0),
            batch_flips(len(store), BATCH, 0, 0),
        )
        for threads in THREADS:
            with ThreadPoolExecutor(threads) as readers:

                def alone() -> torch.Tensor:
                    return store.moments(*where)

                def several(readers: ThreadPoolExecutor = readers) -> torch.Tensor:
                    return store.moments(*where, readers.map)

                require_agreement("moments", alone(), several(), 0.0)
                row = speed_row(
                    f"{BATCH} latents, {threads} threads",
                    ("one thread", alone),
                    ("threads", several),
                    at_least=threads / 2,
                    runs=runs,
                )
            rows.append(row)
    title = f"Reading latents from a disk that answers after {1e3 * DELAY:g} ms"
    settings = {"batch": BATCH, "delay": DELAY, "runs": runs}
    return report("readers", title, rows, settings=settings)


if __name__ == "__main__":
    raise SystemExit(command(main))
