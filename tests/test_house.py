"""The house: which way imports go, one name for a chapter, its module and its tests,
and how long things are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.book import ROOT, chapters
from tools.house import LIMITS, Measured, measure
from tools.interfaces import imports, unused_names

MODULES = [chapter.module for chapter in chapters() if chapter.module]
HEADER = "---\nmodule: {module}\nkernelspec: {{name: python3}}\n---\n\n# {module}\n"


def test_imports_go_one_way() -> None:
    place = {module: number for number, module in enumerate(MODULES)}
    back = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if place[other] >= place[module]
    ]
    assert not back


def page(root: Path, name: str, *cells: str) -> None:
    (root / "book").mkdir(exist_ok=True)
    fences = [f"\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells]
    text = HEADER.format(module=name[3:]) + "".join(fences)
    (root / "book" / f"{name}.md").write_text(text)


def module(root: Path, name: str, text: str) -> None:
    (root / "diffussm").mkdir(exist_ok=True)
    (root / "diffussm" / f"{name}.py").write_text(text)


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    long = "\n".join(f"    x += {i}" for i in range(24))
    page(
        tmp_path,
        "01_alpha",
        ':tags: [export]\n\nimport os\n\n\ndef f():\n    """One line,\n\n    and '
        'more."""\n'
        "    # why\n    return os.sep",  # 2 lines
        f":tags: [export]\n\ndef g(x):\n{long}\n    return x",  # 26
        ":tags: [export, hide-input]\n\ndef h():\n    return 7",  # 2, folded
        "x = 1\ny = 2\n\nassert (\n    x\n    < y\n)  # " + 90 * "-",  # 6, one wide
        ":tags: [hide-input]\n\nz = '" + 90 * "-" + "'",
    )
    module(
        tmp_path,
        "alpha",
        "from diffussm.guards import expect, told\n\n\ndef f(x):\n"  # 2 lines of code
        # 3 guards
        "    # chapter 3\n    if x < 0:\n        x = 0\n        raise ValueError(x)\n"
        "    expect(x)\n    y = expect(x)\n"  # 1 guard, 1 line
        "    with told(x), open(x):\n        return y\n",  # 1 guard, 1 line
    )
    figures = measure(tmp_path).figures
    wanted = (14, 2, 26, 26 / 28, 6, 6, 1, 2 / 30, 74, 12, 5 / 9, 1)
    assert figures == pytest.approx(dict(zip(LIMITS, wanted, strict=True)))
    assert [line.partition(":")[0] for line in measure(tmp_path).broken] == [
        "visible exported cell, median lines",
        "share of exported lines in cells of more than 20",
        "visible code lines over 88 characters",
        "share of guards",
        "chapters named by number in the package",
    ]


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    module(tmp_path, "alpha", "")
    module(tmp_path, "beta", "from diffussm import alpha\n")
    module(tmp_path, "gamma", "def f():\n    import diffussm.beta.x\n    import math\n")
    module(tmp_path, "delta", "from diffussm.alpha import a\nimport diffussm.gamma\n")
    assert imports(tmp_path) == {
        "alpha": set(),
        "beta": {"alpha"},
        "gamma": {"beta"},
        "delta": {"alpha", "gamma"},
    }


def test_names_that_nobody_takes_are_found(tmp_path: Path) -> None:
    page(tmp_path, "01_alpha", "from diffussm.alpha import a  # its own page")
    page(tmp_path, "02_beta", "from diffussm.alpha import b; late('alpha:h')", "%magic")
    page(tmp_path, "03_gamma", "import diffussm.alpha as first\n\nfirst.c()")
    (tmp_path / "README.md").write_text("`diffussm.alpha.d`")
    module(
        tmp_path,
        "alpha",
        '__all__ = ["a", "b", "c", "d", "e", "F", "G", "h", "i"]\n\n\n'
        'def b(x: "F"): ...\n\n\nclass G(ValueError): ...\n\n\na = e = h = i = 1\n',
    )
    for name in ("beta", "gamma"):
        module(tmp_path, name, "__all__ = []\n")
    module(tmp_path, "delta", 'm = import_module("diffussm.alpha")\nm.i\n')
    assert unused_names(tmp_path) == ["alpha.a", "alpha.e"]


def test_readme_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for chapter in chapters():
        if chapter.module:
            assert f"`{chapter.module}`" in readme, chapter.module


def test_each_module_has_tests_of_its_name() -> None:
    without = [m for m in MODULES if not (ROOT / "tests" / f"test_{m}.py").exists()]
    assert not without


def test_public_names_are_taken_by_someone() -> None:
    assert not unused_names(), "give these an underscore in front"


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure()


@pytest.mark.parametrize("name", LIMITS)
def test_figure_holds(name: str, measured: Measured) -> None:
    """`make house` names the longest of each kind."""
    assert [text for text in measured.broken if text.startswith(f"{name}:")] == []
