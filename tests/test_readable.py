"""References as words and links, and back; chapters as notebooks that run alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.book import ROOT, read_chapter
from tools.readable import places, readable, restored
from tools.standalone import HELPERS, NEEDS, install, main, standalone

PAGES = sorted((ROOT / "book").glob("*.md"))
CHAPTERS = [p for p in PAGES if "{code-cell}" in p.read_text(encoding="utf-8")]
AT_HOME = {"04_package"}  # it works on the checkout
LEFT = r"(?<!`)\{(?:ref|numref|eq|cite|term|glue:text)\}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_comes_back_as_it_was(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = readable(text, keep=page.stem)
    assert restored(shown) == text
    assert not re.findall(LEFT.replace("|eq", "") + "(?!.*genindex)", shown)
    for address in re.findall(r'\]\(([\w]+\.md) "\{', shown):
        assert (ROOT / "book" / address).is_file(), address


def test_words_and_links() -> None:
    said = readable("see {ref}`ch-training` and {ref}`this <ch-training>`")
    assert '[Training](36_training.md "{ref} ch-training")' in said
    assert "[this](36_training.md" in said
    assert readable("{cite}`diffussm`", suffix="") == "Yan et al., 2023"
    assert readable("{ref}`ch-nowhere`") == "{ref}`ch-nowhere`"
    assert readable("``{ref}`ch-training` ``") == "``{ref}`ch-training` ``"


@pytest.mark.end_to_end
def test_numbers_are_those_of_the_rendered_book() -> None:
    checked = 0
    for label, place in places().items():
        rendered = ROOT / "_build" / "html" / "book" / f"{place.page}.html"
        if not re.match(r"(Fig\.|Table)\s\d", place.words) or not rendered.exists():
            continue
        html = rendered.read_text(encoding="utf-8")
        number = re.search(
            rf'id="{label}".*?caption-number">([^<]*?) ?<', html, re.DOTALL
        )
        if number:  # a page may be older than its text
            assert number[1] == place.words, label
            checked += 1
    if not checked:
        pytest.skip("the book is not built")


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_every_chapter_becomes_a_notebook(page: Path) -> None:
    if page.stem in AT_HOME:
        with pytest.raises(ValueError, match="reads files of the checkout"):
            standalone(page)
        return
    notebook = standalone(page)
    nbformat.validate(notebook)
    assert notebook.cells[1].source == install(ROOT).source
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert not re.search(r"^`{3,}\{", text, re.MULTILINE) and not re.search(LEFT, text)


# Short ones: plain, with an explorable, with records, named one by one and in a loop,
# with the sheets of a command, and with the rows of the studies.
AWAY = (
    "18_three_ways",
    "17_memory",
    "39_does_the_choice_matter",
    "72_profiling",
    "55_pictures",
    "94_what_matters",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", AWAY)
def test_a_notebook_runs_without_the_checkout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, with the package installed as from an archive.

    With -S, Python does not read the file by which this environment finds the checkout.
    """
    home, site = tmp_path / "home", tmp_path / "site"
    shutil.copytree(ROOT / "diffussm", site / "diffussm")
    home.mkdir()
    monkeypatch.chdir(home)
    assert main([str(ROOT / "book" / f"{name}.md")]) == 0
    code = [c.source for c in nbformat.read(f"{name}.ipynb", 4).cells if is_code(c)]
    Path("run.py").write_text("\n".join(code), "utf-8")
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", "run.py"],
        env=os.environ | {"PYTHONPATH": paths, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in home.iterdir()) == [f"{name}.ipynb", "run.py"]


def is_code(cell: nbformat.NotebookNode) -> bool:
    return bool(cell.cell_type == "code")


def first_cell(url: str, root: Path) -> str:
    """Of the notebooks of a book whose repository has another address."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    settings["repository"] |= {"url": url, "branch": "main"}
    (root / "_config.yml").write_text(yaml.safe_dump(settings), "utf-8")
    return str(install(root).source)


def test_the_package_comes_from_the_repository_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = first_cell("https://github.com/o/r/", tmp_path)
    told: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: told.append(command))
    exec(first, {})
    assert told == []  # it is there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(first, {})
    (command,) = told
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    package = Requirement(next(word for word in command if "diffussm" in word))
    assert package.url == "git+https://github.com/o/r@main"


def test_a_notebook_says_how_to_install_the_package_where_it_has_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = first_cell("", tmp_path)
    exec(first, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="In a checkout.*pip install") as said:
        exec(first, {})
    assert all(extra in str(said.value) for extra in Requirement(NEEDS[0]).extras)
    assert all(other in str(said.value) for other in NEEDS[1:])


def test_what_the_chapters_import_is_installed_with_the_package() -> None:
    """Each package that a cell names is asked for, by the notebook or by an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    package, *others = map(Requirement, NEEDS)
    asked = [*project["dependencies"], *map(str, others)]
    for extra in package.extras:
        asked += project["optional-dependencies"][extra]
    given = {canonicalize_name(Requirement(one).name) for one in asked}
    owners = packages_distributions()
    here = {file.stem for file in (ROOT / "book").glob("*.py")}
    # IPython is there with any notebook; Triton comes with PyTorch, where there is one,
    # and huggingface_hub with diffusers.
    there = {"IPython", "diffussm", "huggingface_hub", "myst_nb", "triton", *here}
    brought = {*there, *sys.stdlib_module_names}
    for page in CHAPTERS:
        if page.stem in AT_HOME:
            continue
        cells = read_chapter(page).cells
        code = "\n".join(cell.source for cell in cells)
        for module in imported(code) - brought:
            found = set(map(canonicalize_name, owners[module]))
            assert found & given, f"{page.stem}: {module}"


def imported(code: str) -> set[str]:
    """The packages that are imported, by their first names."""
    found = re.findall(r"^ *(?:from|import) (\w+)", code, re.MULTILINE)
    return set(found) & set(sys.stdlib_module_names | packages_distributions().keys())


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_the_modules_beside_a_chapter_come_along(page: Path) -> None:
    if page.stem in AT_HOME:
        return
    beside = "|".join(module.stem for module in (ROOT / "book").glob("*.py"))
    _, _, prelude, *cells = standalone(page).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for name in set(re.findall(rf"^(?:from|import) ({beside})\b", code, re.M)):
        assert f"bring({name!r}, " in prelude.source, name


def test_records_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HELPERS:  # what the cell brings is gone after this test
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    prelude = standalone(ROOT / "book" / "39_does_the_choice_matter.md").cells[2].source
    exec(prelude, {})
    recorded = sys.modules["plotting"].recorded
    file = ROOT / "benchmarks" / "results" / "choice.json"
    assert recorded("choice") == json.loads(file.read_text())
    assert recorded("none") == {}


def test_a_wrong_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["book/99_nowhere.md"]) == 2
    assert "99_nowhere.md" in capsys.readouterr().err
