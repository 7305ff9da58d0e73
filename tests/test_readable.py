"""References as words and links, and back; chapters as notebooks that run alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.book import ROOT
from tools.readable import places, readable, restored
from tools.standalone import main, standalone

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
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert not re.search(r"^`{3,}\{", text, re.MULTILINE) and not re.search(LEFT, text)


@pytest.mark.slow
def test_a_notebook_runs_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(ROOT / "book" / "18_three_ways.md")]) == 0
    code = [
        cell.source
        for cell in nbformat.read("18_three_ways.ipynb", 4).cells
        if cell.cell_type == "code"
    ]
    script = tmp_path / "run.py"
    script.write_text(
        "import matplotlib\nmatplotlib.use('agg')\n" + "\n".join(code), "utf-8"
    )
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "run.py"],
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "18_three_ways.ipynb",
        "run.py",
    ]


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_the_modules_beside_a_chapter_come_along(page: Path) -> None:
    if page.stem in AT_HOME:
        return
    beside = "|".join(module.stem for module in (ROOT / "book").glob("*.py"))
    _, prelude, *cells = standalone(page).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for name in set(re.findall(rf"^(?:from|import) ({beside})\b", code, re.M)):
        assert f"bring({name!r}, " in prelude.source, name


def test_records_come_along() -> None:
    prelude = standalone(ROOT / "book" / "39_does_the_choice_matter.md").cells[1].source
    space: dict[str, object] = {}
    exec(prelude, space)
    recorded = space["sys"].modules.pop("plotting").recorded  # type: ignore[attr-defined]
    file = ROOT / "benchmarks" / "results" / "choice.json"
    assert recorded("choice") == json.loads(file.read_text())


def test_a_wrong_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["book/99_nowhere.md"]) == 2
    assert "99_nowhere.md" in capsys.readouterr().err
