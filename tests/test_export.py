"""The exporter: what it writes, what it refuses, and that the committed package is what
the book says.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import functools
import pydoc
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import pytest
import torch

from tools.book import ROOT, chapters, read_chapter
from tools.export import ExportError, build, main

sys.path.insert(0, str(ROOT / "book"))
from literate import method_of

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
        "# Why numpy.\nimport numpy as np\nfrom math import pi\n\n\ndef twice(x):\n "
        "   '''Twice.'''\n"
        "    # a reason\n    return np.asarray(SCALE * math.floor(pi) * x)",
        "class _Hidden:\n    pass\n\n# Stays in front of its function.\ndef last(): "
        "return _Hidden()",
        title="Alpha and omega",
    )
    assert main(["--root", str(root)]) == 0
    assert (root / "diffussm" / "alpha.py").read_text() == (
        '"""Alpha and omega.\n\nGenerated from book/01_alpha.md by `make export`: '
        'edit there.\n"""\n\n'
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
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from torch "
        "import Tensor\n\n\n"
        "def f(x: 'Tensor') -> 'Tensor':\n    return x",
    )
    text = build(root)[root / "diffussm" / "alpha.py"]
    assert "if TYPE_CHECKING:\n    from torch import Tensor\n\n__all__" in text


CONTINUED = '''\
import dataclasses


@dataclasses.dataclass
class Box:
    """A box."""

    width: int
    height: int = 2

    # none
%%
def area(box):
    return -1
%%
# How much it holds.
@method_of(Box)
def area(self):
    """In pixels.

    And more.
    """
    return self.width * self.height  # the product
%%
@method_of(Box)
# a comment
@property
def double(self) -> int:
    return 2 * self.width
%%
@method_of(Box)
@Box.double.setter
def double(self, value):
    self.width = value // 2
%%
@method_of(Box)
@classmethod
def square(cls, side):
    return cls(side, side)


@method_of(Box)
@staticmethod
def poem():
    return """two
lines"""
%%
from typing import overload


@method_of(Box)
@overload
def scaled(self, by: int) -> int: ...


@method_of(Box)
@overload
def scaled(self, by: str) -> str: ...


@method_of(Box)
def scaled(self, by):
    return by * self.width
%%
@method_of(Box)
async def later(self):
    return self.width
%%
class Empty: ...
%%
@method_of(Empty)
def one(self):
    return 1
'''.split("%%\n")


def test_class_continues_over_cells(root: Path) -> None:
    chapter(root, "01_alpha", *CONTINUED)
    text = build(root)[root / "diffussm" / "alpha.py"]
    assert "method_of" not in text
    wanted = '''\
__all__ = ["Box", "area", "Empty"]


@dataclasses.dataclass
class Box:
    """A box."""

    width: int
    height: int = 2

    # none

    # How much it holds.
    def area(self):
        """In pixels.

        And more.
        """
        return self.width * self.height  # the product

    # a comment
    @property
    def double(self) -> int:
        return 2 * self.width

    @double.setter
    def double(self, value):
        self.width = value // 2

    @classmethod
    def square(cls, side):
        return cls(side, side)

    @staticmethod
    def poem():
        return """two
lines"""

    @overload
    def scaled(self, by: int) -> int: ...

    @overload
    def scaled(self, by: str) -> str: ...

    def scaled(self, by):
        return by * self.width

    async def later(self):
        return self.width


def area(box):
    return -1


class Empty:
    def one(self):
        return 1
'''
    assert text[text.index("__all__") :] == wanted


def test_notebook_and_module_have_the_same_class(root: Path) -> None:
    chapter(root, "01_alpha", *CONTINUED)
    module: dict[str, Any] = {"__name__": "__main__"}
    exec(build(root)[root / "diffussm" / "alpha.py"], module)
    notebook: dict[str, Any] = {"__name__": "__main__", "method_of": method_of}
    exec(CONTINUED[0], notebook)
    early = notebook["Box"](3)
    for cell in CONTINUED[1:]:
        exec(cell, notebook)
    for cell in CONTINUED[2:]:
        exec(cell, notebook)  # a reader runs them again
    late = module["Box"](3)
    for box in (early, late):
        box.double = 10
        assert (box.area(), box.double, box.scaled("ab")) == (10, 10, "ab" * 5)
        assert type(box).square(4).area() == 16 and box.poem() == "two\nlines"
        with ThreadPoolExecutor(1) as other:  # a browser's loop may run in this thread
            assert other.submit(asyncio.run, box.later()).result() == 5
    assert notebook["area"](early) == module["area"](late) == -1  # not the method
    assert notebook["Empty"]().one() == 1

    def described(names: dict[str, Any]) -> list[str]:
        return sorted(pydoc.plain(pydoc.render_doc(names["Box"])).splitlines())

    assert described(notebook) == described(module)
    for names in (notebook, module):
        assert vars(names["Box"])["square"].__func__.__qualname__ == "Box.square"
        assert names["Box"].double.fset.__qualname__ == "Box.double"


def test_notebook_extends_layers_abstract_classes_and_dataclasses() -> None:
    class Layer(torch.nn.Module):
        pass

    layer = Layer()

    @method_of(Layer)
    @torch.no_grad()
    def forward(self: Any, x: Any) -> Any:
        return 2 * x

    assert layer(3) == 6
    assert Layer.forward.__wrapped__.__qualname__ == f"{Layer.__qualname__}.forward"

    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self) -> int: ...

    class Unit(Shape):
        pass

    @method_of(Unit)
    def area(self: Any) -> int:
        return 1

    assert Unit().area() == 1

    @dataclasses.dataclass(frozen=True)
    class Steps:
        count: int = 1

    @method_of(Steps)
    def __post_init__(self: Any) -> None:
        if self.count < 1:
            raise ValueError(self.count)

    @method_of(Steps)
    @functools.cached_property
    def twice(self: Any) -> int:
        return 2 * self.count

    with pytest.raises(ValueError, match="0"):
        Steps(0)
    assert Steps(2).twice == 4


def test_notebook_refuses_what_is_no_class_or_no_function() -> None:
    with pytest.raises(TypeError, match="expected a class"):
        method_of("Box")  # type: ignore[arg-type]
    for member in (3, int):
        with pytest.raises(TypeError, match="expected a function"):
            method_of(Exception)(member)


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
            "`f` is defined twice; first at book/01_alpha.md, cell 1, line 25",
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
        (
            "@method_of(Bux)\ndef g(self):\n    pass",
            "no exported cell above defines the class `Bux`; the nearest is `Box`",
        ),
        (
            "@method_of(Path)\ndef g(self):\n    pass",
            "a method of another class: pathlib.Path continues only in its own chapter",
        ),
        (
            "@method_of(Box)\ndef size(self):\n    pass",
            "`Box.size` is defined twice; first at book/01_alpha.md, cell 1, line 32",
        ),
        (
            "@method_of(Box)\ndef g(self):\n    pass\n\n\n"
            "@method_of(Box)\ndef g(self):\n    pass",
            "`Box.g` is defined twice; first at book/01_alpha.md, cell 3",
        ),
        ("@method_of(Box)\ndef side(self):\n    pass", "`Box.side` is defined twice"),
        ("@method_of(Box)\nclass Inner:\n    pass", "of functions, this is a class"),
        ("@method_of\ndef g(self):\n    pass", "write `@method_of(Class)`"),
        ("@method_of('Box')\ndef g(self):\n    pass", "write `@method_of(Class)`"),
        ("@property\n@method_of(Box)\ndef g(self):\n    pass", "the first decorator"),
        ("@method_of(Box)\n@method_of(Box)\ndef g(self):\n    pass", ", once, "),
        (
            "@method_of(Box)\ndef g(self):\n    return super().g()",
            "write `super(Class, self)`",
        ),
        ("@method_of(Box)\ndef g(self):\n    self.__x = 1", "Python renames `__x`"),
        (
            "def g():\n    @method_of(Box)\n    def h(self):\n        pass",
            "`method_of` is used",
        ),
        ("from literate import method_of", "`literate` belongs to the book"),
        (
            "def g():\n    '''As in ch. \"A tittle\".'''",
            'no chapter has the title "A tittle"; the nearest is A title',
        ),
        (
            "# the kernel (eq-alpha-kernal)",
            "no label eq-alpha-kernal; the nearest is eq-alpha-kernel",
        ),
        ("# as in chapter 9\nB = 1", "`chapter 9`: chapters move"),
        ("B = 1\n# unlike fetch. 3 or chapter nine, as ch. 3", "`ch. 3`: chapters"),
        ("def g():\n    '''See fig-b.'''", "the book has no label fig-b"),
    ],
)
def test_refused_with_chapter_cell_and_line(
    root: Path, cell: str, message: str
) -> None:
    chapter(
        root,
        "01_alpha",
        "import os\nfrom pathlib import Path\n\n\ndef f():\n    return "
        "Path(os.sep)\n\n\n"
        "class Box:\n    side: int\n\n    def size(self):\n        pass",
        "#!\npass",
        cell,
    )
    (root / "book" / "literate.py").touch()
    labelled = "```{math}\n:label: eq-alpha-kernel\nx\n```\n"
    (root / "book" / "notation.md").write_text(labelled)
    chapter(root, "02_beta", "def g():\n    pass")
    fault = refused(root)
    assert message in fault
    assert "book/01_alpha.md, cell 3, line " in fault
    number = int(fault.split("cell 3, line ")[1].split(":")[0])
    lines = (root / "book" / "01_alpha.md").read_text().splitlines()
    first = max(i for i, line in enumerate(lines, 1) if line == cell.splitlines()[0])
    assert first <= number < first + len(cell.splitlines())


def test_references_are_resolved(root: Path) -> None:
    cell = '''\
def f(ref):
    """As {ref}`ch-alpha` and {eq}`eq-x` (ch. "A
    title").
    """
    # {numref}`fig-x`, chapter
    # "A title"
    return "{ref}" + f'{ref}`eq-x`'
'''
    page = chapter(root, "01_alpha", cell)
    labelled = "(ch-alpha)=\n# A title\n\n(fig-x)=\n\n$$\n:label: eq-x\n"
    page.write_text(page.read_text().replace("# A title\n", labelled, 1))
    text = build(root)[root / "diffussm" / "alpha.py"]
    assert 'As ch. "A title" and eq-x (ch. "A\n    title").' in text
    assert "# fig-x, chapter\n" in text
    assert """return "{ref}" + f"{ref}`eq-x`\"""" in text


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


@pytest.mark.slow  # `make check` does it by itself
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
