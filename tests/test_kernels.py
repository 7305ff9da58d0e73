"""Chapters run in copies of one process: as they would in processes of their own."""

import sys

import nbformat
import pytest
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient

from tools.kernels import use_warm_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux"),
]

CELLS = (
    "import os, signal, sys, threading\nimport matplotlib.pyplot as plt\nimport torch",
    "print(sys.path, sys.flags, __name__, os.getcwd())",
    "print(sorted((k, v) for k, v in os.environ.items() if k != 'JPY_PARENT_PID'))",
    "print(signal.getsignal(signal.SIGINT), os.getpgid(0) == os.getpid())",
    "print(torch.get_num_threads(), plt.get_backend())",
    "plt.plot([1, 2]);",
    "!pwd",
    "from multiprocessing import get_context\n"
    "with get_context('spawn').Pool(1) as pool:\n    print(pool.map(abs, [-1]))",
    "1 / 0",
)
COPIED = "print(open(f'/proc/{os.getppid()}/status').read().split('Threads:')[1][:3])"


@pytest.fixture
def factory():
    factory = KernelProvisionerFactory.instance()
    yield factory
    factory.default_provisioner_name = "local-provisioner"


def outputs(folder, *cells):
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    client = NotebookClient(book, kernel_name="python3", allow_errors=True)
    client.execute(cwd=folder)
    for output in (told := [cell.outputs for cell in book.cells])[-1]:
        output.pop("traceback", None)  # in which the process is named
    return told


def test_a_copy_is_as_a_process_of_its_own(tmp_path, factory):
    cold = outputs(tmp_path, *CELLS)
    use_warm_kernels()
    assert outputs(tmp_path, *CELLS) == cold


def test_it_has_the_libraries_and_what_it_copies_has_one_thread(tmp_path, factory):
    use_warm_kernels()
    lacking = "import sys; print('torch' in sys.modules, 'diffussm' in sys.modules)"
    told = outputs(tmp_path, lacking, "import os", COPIED)
    assert [output[0].text.strip() for output in told[::2]] == ["True False", "1"]
