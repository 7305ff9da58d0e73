"""Chapters run in copies of one process: as they would in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from tools.book import ROOT

# In a process of its own: a process has one server of forks, and tests have another.
PROGRAM = """
import json, sys
import nbformat
from nbclient import NotebookClient
from tools.kernels import use_warm_kernels

def outputs(*cells):
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    client = NotebookClient(
        book, kernel_name="python3", allow_errors=True,
        coalesce_streams=True,  # a line comes in as many parts as it happens to
    )
    client.execute(cwd=sys.argv[1])
    for output in (told := [cell.outputs for cell in book.cells])[-1]:
        output.pop("traceback", None)  # in which the process is named
    return told

if __name__ == "__main__":
    cells, copied = json.loads(sys.argv[2])
    cold = outputs(*cells)
    use_warm_kernels()
    print(json.dumps([cold, outputs(*cells), outputs(*copied)]))
"""
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
COPIED = (
    "import os, sys\nprint('torch' in sys.modules, 'diffussm' in sys.modules)",
    "print(open(f'/proc/{os.getppid()}/status').read().split('Threads:')[1][:3])",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux")
def test_a_copy_is_as_a_process_of_its_own_and_has_the_libraries(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = [sys.executable, program, tmp_path, json.dumps([CELLS, COPIED])]
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | path)
    assert done.returncode == 0, done.stderr
    cold, warm, copied = json.loads(done.stdout)
    assert warm == cold
    assert [output[0]["text"].split() for output in copied] == [
        ["True", "False"],
        ["1"],
    ]
