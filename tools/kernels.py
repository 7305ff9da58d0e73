"""Kernels that start warm.

Many chapters compute little, but the kernel of each imports the same libraries. Here
one process imports them, and every kernel is a copy of it (a fork).
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import cache
from importlib.metadata import EntryPoint
from multiprocessing.context import ForkServerProcess
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

__all__ = ["WarmProvisioner", "use_warm_kernels"]


def use_warm_kernels() -> None:
    """From now on the kernels that this process starts are copies of `tools.warm`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tools.warm"])
    factory = KernelProvisionerFactory.instance()
    place = f"{WarmProvisioner.__module__}:{WarmProvisioner.__name__}"
    factory.provisioners["warm"] = EntryPoint("warm", place, factory.GROUP_NAME)
    factory.default_provisioner_name = "warm"


class WarmProvisioner(LocalProvisioner):
    """Starts a kernel as a copy of a process that has imported the libraries."""

    process: Any

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Start a kernel; `cmd` names its connection file."""
        self.cwd = os.fspath(kwargs.get("cwd") or os.getcwd())
        arguments = cmd[cmd.index("-f") :]
        kernel = _Kernel(self.cwd, _fresh_path(), kwargs["env"], arguments)
        kernel.start()
        self.process, self.pid, self.pgid = kernel, kernel.pid, kernel.pid
        return self.connection_info


class _Kernel(ForkServerProcess):
    """A process that answers to what is asked of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, *given: Any) -> None:
        super().__init__(target=_be_a_kernel, args=given)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.pid is not None:
            os.kill(self.pid, number)


def _be_a_kernel(
    folder: str, path: list[str], environment: dict[str, str], arguments: list[str]
) -> None:
    """Become what `python -m ipykernel_launcher` is when it has started."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # a group of its own, for signals are sent to groups
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    ends_with = f"--IPKernelApp.parent_handle={os.getppid()}"
    IPKernelApp.launch_instance([*arguments, ends_with])
    sys.modules["__main__"].__dict__.clear()  # as an interpreter does when it ends
    gc.collect()


@cache
def _fresh_path() -> list[str]:
    """Where a new interpreter looks for modules, after the folder that it is in."""
    program = "import json, sys; print(json.dumps(sys.path[1:]))"
    words = [sys.executable, "-c", program]
    told = subprocess.run(words, check=True, capture_output=True).stdout
    path: list[str] = json.loads(told)
    return path
