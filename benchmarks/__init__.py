"""Ratios measured side by side, one command each."""

import os

# Threads that wait for each other are to sleep and not to spin: spinning keeps a core
# from the thread that is waited for if anything else runs on the machine (README.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
