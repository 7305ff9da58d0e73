"""`torchrun tests/one_rank_fails.py COMMAND ...`: the last process fails.

Closing the process group takes ten minutes here, as NCCL's may when a process waits
for another.
"""

import os
import sys
import time

import torch.distributed

from diffussm import autoencoder, cli, encoding, samples
from diffussm.diffusion import GaussianDiffusion

LAST = os.environ["RANK"] == "1"
WHY = "the disk of this machine is full"


def fail(*_: object, **__: object) -> None:
    """What goes wrong."""
    raise OSError(WHY)


def main() -> int:
    """Run the command, with what breaks it."""
    torch.distributed.destroy_process_group = lambda *_: time.sleep(600)
    autoencoder.load_vae = lambda *_: None
    encoding.encode = fail if LAST else lambda *_, **__: None
    if LAST:
        honest, calls = GaussianDiffusion.losses, []

        def losses(*arguments: object) -> object:
            calls.append(1)
            return fail() if len(calls) == 3 else honest(*arguments)

        GaussianDiffusion.losses = losses
        samples.draw_batch = fail
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
