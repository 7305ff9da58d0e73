"""``pytest --nbmake book/`` runs chapters from their text, and names failing cells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.book import ROOT, chapters
from tools.preface import has_quick_mode

pytestmark = pytest.mark.end_to_end

CHAPTER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell} ipython3
from pathlib import Path

assert Path.cwd().name == "book"
```

Prose.

```{code-cell} ipython3
value = 1 / DIVISOR
```
"""


def run(
    folder: Path, *options: str, quick: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--color=no",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QUICK": quick}
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.fixture
def book(tmp_path: Path) -> Path:
    folder = tmp_path / "book"
    folder.mkdir()
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (folder / "index.md").write_text("# Prose only\n")
    (folder / "01_toy.md").write_text(CHAPTER.replace("DIVISOR", "2"))
    return folder


def test_chapter_runs_from_its_text_and_stays_as_it_is(book: Path) -> None:
    before = {path.name: path.read_bytes() for path in book.iterdir()}
    done = run(book.parent, "--nbmake", "--overwrite", "book")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    assert {path.name: path.read_bytes() for path in book.iterdir()} == before


def test_failure_names_chapter_and_cell(book: Path) -> None:
    (book / "01_toy.md").write_text(CHAPTER.replace("DIVISOR", "0"))
    done = run(book.parent, "--nbmake", "book")
    assert done.returncode == 1
    assert "01_toy.md, cell 2: ZeroDivisionError" in done.stdout
    assert "value = 1 / 0" in done.stdout


def test_plain_pytest_leaves_the_chapters_alone(book: Path) -> None:
    assert "no tests ran" in run(book.parent, "book").stdout


def test_outputs_can_be_kept_for_the_pages(book: Path) -> None:
    keep = ("--nbmake", "--keep-outputs", str(book.parent / "cache"), "book")
    done = run(book.parent, *keep)
    assert done.returncode == 0, done.stdout
    from jupyter_cache import get_cache

    records = get_cache(str(book.parent / "cache")).list_cache_records()
    assert [Path(record.uri).name for record in records] == ["01_toy.md"]
    assert "1 skipped" in run(book.parent, *keep, "--skip-kept").stdout
    (book / "01_toy.md").write_text(CHAPTER.replace("DIVISOR", "3"))
    assert "1 passed" in run(book.parent, *keep, "--skip-kept").stdout


def test_outputs_of_a_quick_run_are_not_kept(book: Path) -> None:
    (book / "01_toy.md").write_text(CHAPTER.replace("DIVISOR", "1 + QUICK"))
    text = (book / "01_toy.md").read_text()
    asks = "from pathlib import Path\n\nfrom quick import QUICK\n\nassert QUICK"
    (book / "01_toy.md").write_text(text.replace("from pathlib import Path", asks))
    shutil.copy(ROOT / "book" / "quick.py", book)
    assert run(book.parent, "--nbmake", "book", quick="1").returncode == 0
    keep = ("--nbmake", "--keep-outputs", str(book.parent / "cache"), "book")
    done = run(book.parent, *keep, quick="1")
    assert done.returncode == 4 and "unset QUICK" in done.stderr
    assert not (book.parent / "cache").exists()
    assert run(book.parent, *keep, quick="0").returncode == 1  # not quick: it asserts


def test_pages_with_a_quick_mode_have_it_outside_of_the_package() -> None:
    quick = [chapter for chapter in chapters() if has_quick_mode(chapter)]
    assert "36_training" in [chapter.path.stem for chapter in quick]
    for chapter in quick:
        assert not [cell for cell in chapter.exported if "QUICK" in cell.source]
        cells = "\n".join(cell.source for cell in chapter.cells)
        assert len(re.findall(r"\bQUICK\b", cells)) > 1, f"{chapter.name} never asks"


def test_a_page_runs_in_quick_mode() -> None:
    done = run(ROOT, "--nbmake", "book/53_autoencoder.md", quick="1")
    assert done.returncode == 0, done.stdout
