"""What several tests share: a browser, folders of images, stores of latents."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, by whatever does
    os.environ["TRITON_INTERPRET"] = "1"

from browsers import absent
from commands import plain, work  # noqa: F401 (fixtures)
from pictures import encoded, noise_image, write
from stages import computed, opened  # noqa: F401 (fixtures)
from stores import copy, one_thread, root, vae, whole  # noqa: F401 (fixtures)

from tools.pdf import BROWSERS

pytest.register_assert_rewrite("page_checks")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser for all tests of this process: Playwright's loop runs once in a
    process.
    """
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        absent("no Chromium on this machine", "DIFFUSSM_REQUIRE_BROWSER")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield instance
        instance.close()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Three classes of three images, in folders that are not made in order."""
    for c, name in enumerate(("b_second", "a_first", "c_third")):
        for k in range(3):
            picture = encoded(noise_image(40, 30, 10 * c + k), "JPEG")
            write(tmp_path / "zoo" / name / f"{k}.JPEG", picture)
    return tmp_path / "zoo"
