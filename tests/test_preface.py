"""What stands under a chapter's title is read from the chapter."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

from tools.book import ROOT, labels, reading_order
from tools.overview import parts
from tools.preface import builds_on, preface

PAGE = "---\nmodule: {module}\n---\n\n(ch-{module})=\n# {module}\n\n{words}\n\n"
CELL = "```{{code-cell}} ipython3\n:tags: [{tags}]\n\n{code}\n```\n"


def page(root: Path, module: str, words: int, *cells: tuple[str, str]) -> None:
    box = "\n\n```{note}\n:class: dropdown\n\none\n```\n\n"
    text = PAGE.format(module=module, words=f"word {box}" + "word " * words)
    text += "".join(CELL.format(tags=tags, code=code) for tags, code in cells)
    (root / "book" / f"{module}.md").write_text(text, encoding="utf-8")


def test_preface_is_read_from_words_imports_and_cells(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    names = ("alpha", "beta", "gamma", "delta")
    toc = "".join(f"      - file: book/{name}\n" for name in names)
    (tmp_path / "_toc.yml").write_text(
        f"parts:\n  - numbered: true\n    caption: A\n    chapters:\n{toc}"
        "  - chapters:\n      - file: book/last\n"
    )
    imports = "from diffussm.{} import x"
    page(tmp_path, "alpha", 10, ("export", "def train(): ..."))
    page(tmp_path, "beta", 250, ("export", imports.format("alpha")))
    page(
        tmp_path,
        "gamma",
        10,
        ("export", f"{imports.format('beta')}\n{imports.format('alpha')}"),
        ("hide-input", f"{imports.format('delta')}\ntrain(1)"),
    )
    page(tmp_path, "delta", 10, ("export", imports.format("alpha")))
    assert preface("book/alpha", tmp_path) == "1 min to read."
    assert preface("book/beta", tmp_path) == "2 min to read; builds on {ref}`ch-alpha`."
    assert preface("book/gamma", tmp_path) == (
        "1 min to read; builds on {ref}`ch-beta`; its cells train a network."
    )
    assert preface("book/delta", tmp_path).endswith("builds on {ref}`ch-alpha`.")
    assert preface("book/last", tmp_path) == ""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    took = (("alpha", 3), ("beta", 61), ("gamma", 200))
    rows = [{"chapter": name, "seconds": seconds} for name, seconds in took]
    (results / "chapters.json").write_text(json.dumps({"rows": rows}))
    assert preface("book/alpha", tmp_path) == "1 min to read; 10 s to run."
    assert preface("book/beta", tmp_path).startswith("2 min to read; 70 s to run; b")
    assert preface("book/gamma", tmp_path).startswith("1 min to read; 4 min to run; b")


def test_preface_tells_how_long_the_quick_mode_takes(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    names = ("alpha", "beta")
    toc = "".join(f"      - file: book/{name}\n" for name in names)
    (tmp_path / "_toc.yml").write_text(
        f"parts:\n  - numbered: true\n    caption: A\n    chapters:\n{toc}"
    )
    page(tmp_path, "alpha", 10, ("hide-input", "from quick import QUICK"))
    page(tmp_path, "beta", 10, ("hide-input", "quick = True"))
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for record, seconds in (("chapters", 245), ("quick", 38)):
        rows = [{"chapter": name, "seconds": seconds} for name in names]
        (results / f"{record}.json").write_text(json.dumps({"rows": rows}))
    told = "1 min to read; 5 min to run, 40 s with `QUICK=1`."
    assert preface("book/alpha", tmp_path) == told
    assert preface("book/beta", tmp_path) == "1 min to read; 5 min to run."


def test_what_is_next_is_the_next_page() -> None:
    pages = [(ROOT / f"{page}.md").read_text("utf-8") for page in reading_order()]
    found = 0
    for page, following in pairwise(pages):
        if told := re.search(r"^Next:.*?(?=To read on|\n\n)", page, re.M | re.S):
            assert f"`{labels(following)[0]}`" in told[0], told[0]
            found += 1
    assert found > 100


def test_no_chapter_builds_on_one_that_is_read_later() -> None:
    pages = [
        chapter.name.removesuffix(".md") for _, part in parts() for chapter in part
    ]
    for place, name in enumerate(pages):
        assert set(builds_on(name)) <= set(pages[:place])
        assert preface(name).endswith(".")
    assert preface("book/notation") == ""
    assert preface("book/36_training").endswith("its cells train a network.")
