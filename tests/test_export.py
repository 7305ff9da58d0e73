"""The exporter: what it writes, what it refuses, and that the committed package is what the book says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from tools.book import ROOT, chapters, read_chapter
from tools.export import ExportError, build, main

HEADER = """\
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
module: {module}
---

# {title}
"""


def chapter(
    root: Path,
    name: str,
    *cells: str,
    module: str | None = None,
    title: str = "A title",
) -> Path:
    """Write a chapter; a cell that starts with `#!` and words is not exported."""
    text = HEADER.format(module=module or name[3:], title=title)
    for cell in cells:
        tags = "" if cell.startswith("#!") else ":tags: [export]\n\n"
        text += (
            f"\nSome prose.\n\n```{{code-cell}} ipython3\n{tags}{cell.strip()}\n```\n"
        )
    path = root / "book" / f"{name}.md"
    path.write_text(text)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "book").mkdir()
    (tmp_path / "diffussm").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def refused(root: Path) -> str:
    with pytest.raises(ExportError) as caught:
        build(root)
    assert main(["--root", str(root)]) == 1
    assert not list((root / "diffussm").glob("[!_]*.py")), (
        "something was written all the same"
    )
    return str(caught.value)


def test_module_reads_as_if_written_by_hand(root: Path) -> None:
    chapter(
        root,
        "01_alpha",
        "import os\nimport math\n\nSCALE = 2.0  # why two",
        "#!\nprint('not exported')",
        "# Why numpy.\nimport numpy as np\nfrom math import pi\n\n\ndef twice(x):\n    '''Twice.'''\n"
        "    # a reason\n    return np.asarray(SCALE * math.floor(pi) * x)",
        "class _Hidden:\n    pass\n\n# Stays in front of its function.\ndef last(): return _Hidden()",
        title="Alpha and omega",
    )
    assert main(["--root", str(root)]) == 0
    assert (root / "diffussm" / "alpha.py").read_text() == (
        '"""Alpha and omega.\n\nGenerated from book/01_alpha.md by `make export`: edit there.\n"""\n\n'
        "import math\nfrom math import pi\n\n# Why numpy.\nimport numpy as np\n\n"
        '__all__ = ["SCALE", "twice", "last"]\n\n'
        "SCALE = 2.0  # why two\n\n\n"
        'def twice(x):\n    """Twice."""\n    # a reason\n'
        "    return np.asarray(SCALE * math.floor(pi) * x)\n\n\n"
        "class _Hidden:\n    pass\n\n\n"
        "# Stays in front of its function.\ndef last():\n    return _Hidden()\n"
    )


def test_typing_imports_stay_apart(root: Path) -> None:
    chapter(
        root,
        "01_alpha",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from torch import Tensor\n\n\n"
        "def f(x: 'Tensor') -> 'Tensor':\n    return x",
    )
    text = build(root)[root / "diffussm" / "alpha.py"]
    assert "if TYPE_CHECKING:\n    from torch import Tensor\n\n__all__" in text


def test_second_run_changes_nothing(root: Path) -> None:
    chapter(root, "01_alpha", "def f():\n    return 1")
    chapter(
        root, "02_beta", "from diffussm.alpha import f\n\n\ndef g():\n    return f()"
    )
    assert main(["--root", str(root)]) == 0
    files = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in (root / "diffussm").iterdir()
    }
    assert sorted(path.name for path in files) == ["alpha.py", "beta.py"]
    assert main(["--root", str(root)]) == 0
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files
    } == files


def test_check_shows_the_difference(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chapter(root, "01_alpha", "def f():\n    return 1")
    assert main(["--root", str(root)]) == 0
    assert main(["--root", str(root), "--check"]) == 0
    module = root / "diffussm" / "alpha.py"
    edited = module.read_text().replace("return 1", "return 2")
    module.write_text(edited)
    capsys.readouterr()
    assert main(["--root", str(root), "--check"]) == 1
    shown = capsys.readouterr().out
    assert "-    return 2" in shown and "+    return 1" in shown
    assert module.read_text() == edited


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "def f():\n    pass",
            "`f` is defined twice; first at book/01_alpha.md, cell 1, line 24",
        ),
        ("from math import floor as f", "`f` is defined twice"),
        ("import json as os", "`os` is imported twice"),
        ("class os:\n    pass", "`os` is defined twice"),
        ("def g(:\n    pass", "syntax error"),
        ("%matplotlib inline", "IPython command"),
        ("!ls", "IPython command"),
        ("from .beta import g", "relative import"),
        ("from math import *", "`import *`"),
        ("print(1)", "`print(1)` would run on import"),
        ("for i in range(3):\n    pass", "would run on import"),
        ("x = 3", "`x = ...`"),
        ("A = 1; B = 2", "two statements on one line"),
        ("def g():\n    return undefined_name", "`undefined_name` is used"),
        ("from diffussm.alpha import f as g", "imports its own module diffussm.alpha"),
        (
            "from diffussm.beta import g",
            "imports diffussm.beta of a later chapter, book/02_beta.md",
        ),
        ("from diffussm import beta", "imports diffussm.beta of a later chapter"),
        (
            "def h():\n    from diffussm.beta import g\n\n    return g",
            "of a later chapter",
        ),
        ("import diffussm.gamma", "imports diffussm.gamma, which no chapter exports"),
        ("#!\nfrom diffussm.beta import g", "of a later chapter"),
    ],
)
def test_refused_with_chapter_cell_and_line(
    root: Path, cell: str, message: str
) -> None:
    chapter(
        root, "01_alpha", "import os\n\n\ndef f():\n    return os.sep", "#!\npass", cell
    )
    chapter(root, "02_beta", "def g():\n    pass")
    fault = refused(root)
    assert message in fault
    assert "book/01_alpha.md, cell 3, line " in fault
    number = int(fault.split("cell 3, line ")[1].split(":")[0])
    lines = (root / "book" / "01_alpha.md").read_text().splitlines()
    first = max(i for i, line in enumerate(lines, 1) if line == cell.splitlines()[0])
    assert first <= number < first + len(cell.splitlines())


def test_two_chapters_with_one_module_are_refused(root: Path) -> None:
    chapter(root, "01_alpha", "def f():\n    pass")
    chapter(root, "02_beta", "def g():\n    pass", module="alpha")
    fault = refused(root)
    assert (
        "book/02_beta.md: exports to diffussm.alpha, as does book/01_alpha.md" in fault
    )
    assert "`module: alpha`, expected beta" in fault


def test_cell_for_another_module_is_refused(root: Path) -> None:
    path = chapter(root, "01_alpha", "def f():\n    pass")
    path.write_text(
        path.read_text().replace(":tags: [export]", ":export-to: beta\n:tags: [export]")
    )
    assert "cell 1, line 22: exports to beta" in refused(root)


def test_module_without_chapter_is_refused(root: Path) -> None:
    chapter(root, "01_alpha", "def f():\n    pass")
    for name in ("__init__.py", "__main__.py", "old.py"):
        (root / "diffussm" / name).touch()
    with pytest.raises(
        ExportError, match=r"diffussm/old.py: no chapter exports it; delete it"
    ):
        build(root)


def test_all_faults_are_told_at_once(root: Path) -> None:
    chapter(root, "01_alpha", "x = 1", "y = 2")
    chapter(root, "02_beta", "def g(:\n    pass")
    assert len(refused(root).splitlines()) == 3


def test_one_chapter_can_be_exported_alone(root: Path) -> None:
    chapter(root, "01_alpha", "x = 1")
    chapter(root, "02_beta", "def g():\n    pass")
    assert main(["--root", str(root), "book/02_beta.md"]) == 0
    assert [path.name for path in (root / "diffussm").iterdir()] == ["beta.py"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "book").glob("[0-9][0-9]_*.md")), ids=lambda path: path.stem
)
def test_cells_are_those_that_jupytext_finds(path: Path) -> None:
    theirs = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    ours = read_chapter(path).cells
    assert [cell.source for cell in ours] == [cell.source for cell in theirs]
    assert [cell.tags for cell in ours] == [
        cell.metadata.get("tags", []) for cell in theirs
    ]
    lines = path.read_text(encoding="utf-8").splitlines()
    for cell in ours:
        assert lines[cell.line - 1] == cell.source.splitlines()[0]


def test_package_is_what_the_book_says() -> None:
    command = [sys.executable, "-m", "tools.export", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_comes_from_one_chapter_in_order() -> None:
    modules = [chapter.module for chapter in chapters() if chapter.module]
    assert len(set(modules)) == len(modules)
    written = {path.stem for path in (ROOT / "diffussm").glob("[!_]*.py")}
    assert written == set(modules)
