"""What most chapters import. `tools.kernels` copies a process that has it.

Nothing stands here that reads the environment when it is imported, for a chapter may
have something to say there first; and nothing that starts a thread, for threads are
not copied.
"""

import os

os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as kernels do

import einops  # noqa: F401
import ipykernel.kernelapp  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import myst_nb  # type: ignore[import-untyped]  # noqa: F401
import torch  # noqa: F401
