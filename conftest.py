"""`pytest --nbmake book/` runs chapters from their text, and writes nothing beside."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option with which `make test` runs the chapters only once."""
    parser.addoption(
        "--keep-outputs",
        metavar="CACHE",
        help="store what the chapters put out in this execution cache, where the "
        "book build finds it",
    )
    parser.addoption(
        "--skip-kept",
        action="store_true",
        help="run only the chapters of which --keep-outputs has none yet",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Outputs of a quick run are never those of the book."""
    if not config.getoption("--keep-outputs"):
        return
    from tools.book import is_quick

    if is_quick():
        raise pytest.UsageError(
            "QUICK=1 is set, and the outputs of a quick run are not those of the book: "
            "unset QUICK, or run `QUICK=1 pytest --nbmake book/` without --keep-outputs"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long; skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting:
        import torch

        if not torch.cuda.is_available():
            for item in wanting:
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs a GPU; benchmarks/gpu.sh runs these tests"
                    )
                )


def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> pytest.Collector | None:
    """With --nbmake, every Markdown page that has code cells is a test."""
    if file_path.suffix != ".md" or not parent.config.getoption(
        "nbmake", default=False
    ):
        return None
    if not re.search(
        r"^`{3,}\{code-cell\}", file_path.read_text(encoding="utf-8"), re.MULTILINE
    ):
        return None
    # Imported here: a plain run of the unit tests needs neither Jupyter nor nbmake.
    from nbmake.nb_run import NotebookRun
    from nbmake.pytest_items import NotebookFailedException, NotebookFile, NotebookItem

    class Text:
        """Stands for the chapter: its notebook is elsewhere, its folder is here."""

        def __init__(self, notebook: Path) -> None:
            self.notebook = notebook
            self.parent = file_path.parent

        def __str__(self) -> str:
            return str(self.notebook)

    class ChapterItem(NotebookItem):
        def runtest(self) -> None:
            import jupytext
            import nbformat

            many = len(self.session.items) > 2  # a few start sooner by themselves
            if many and sys.platform == "linux":
                from tools.kernels import use_warm_kernels

                use_warm_kernels()
            option = self.config.option
            notebook = jupytext.read(file_path)
            kept = option.skip_kept and option.keep_outputs
            if kept and is_kept(option.keep_outputs, notebook):
                pytest.skip("its outputs are kept")
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, f"{file_path.stem}.ipynb")
                nbformat.write(notebook, copy)
                run = NotebookRun(
                    Text(copy), option.nbmake_timeout, kernel=option.nbmake_kernel
                )  # type: ignore[arg-type]
                start = time.monotonic()
                result = run.execute()
            if result.error is not None:
                cells = result.nb.cells[: result.error.failing_cell_index + 1]
                number = sum(cell.cell_type == "code" for cell in cells)
                place = f"{file_path.name}, cell {number}"
                # The kernel's traceback is coloured for a terminal; the line in the
                # summary is for everyone.
                plain = re.sub(r"\x1b\[[0-9;]*m", "", result.error.summary)
                result.error.summary = f"{place}: {plain}"
                result.error.trace = f"{place}\n{result.error.trace}"
                raise NotebookFailedException(result)
            if option.keep_outputs:
                keep_outputs(
                    option.keep_outputs, file_path, result.nb, time.monotonic() - start
                )

    class ChapterFile(NotebookFile):
        def collect(self) -> Iterator[Any]:
            yield ChapterItem.from_parent(self, filename=str(file_path))

    return ChapterFile.from_parent(parent, path=file_path)


def is_kept(folder: str, notebook: Any) -> bool:
    """Whether the outputs of this very code are in the cache."""
    from jupyter_cache import get_cache

    try:
        get_cache(folder).match_cache_notebook(notebook)
    except KeyError:
        return False
    return True


def keep_outputs(folder: str, chapter: Path, notebook: Any, seconds: float) -> None:
    """Store an executed chapter as the book build would have."""
    from filelock import FileLock
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    notebook.metadata.pop("widgets", None)  # they belong to this kernel
    for cell in notebook.cells:
        cell.metadata.pop(
            "execution", None
        )  # the times of the run, which are no part of the chapter
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two chapters may end at once
        get_cache(folder).cache_notebook_bundle(
            CacheBundleIn(notebook, str(chapter), data={"execution_seconds": seconds}),
            check_validity=False,
            overwrite=True,
        )
