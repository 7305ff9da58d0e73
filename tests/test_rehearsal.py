"""The whole road at full scale, walked small: the commands of the book, one after the
other.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.book import ROOT


@pytest.mark.end_to_end
def test_the_whole_road_holds() -> None:
    command = [sys.executable, "-m", "tools.rehearsal"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal: everything held" in done.stdout
