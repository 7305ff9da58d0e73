"""Tables, players and figures of the pages: each has a caption and a name, so that it
has a number and the text can point to it.
"""

from __future__ import annotations

import re

import pytest

from tools.book import ROOT, Cell, chapters, read_chapter

PAGES = sorted((ROOT / "book").glob("*.md"))
BLOCK = re.compile(r"^(`{3,}|:{3,})\{(\S+)\}.*?^\1$", re.DOTALL | re.MULTILINE)
# An admonition has a title, and an answer stands under its question.
TITLED = {"code-cell", "admonition", "dropdown", "note", "table"}


def bare_tables(text: str) -> list[str]:
    """The first lines of tables that stand in the text without a caption."""
    outside = BLOCK.sub(lambda m: "" if m[2] in TITLED else m[0], text)
    return re.findall(r"^(\|.*)\n\|[ :|-]+\|$", outside, re.MULTILINE)


def kind(cell: Cell) -> str:
    """What a cell shows: `tab` for a table, `fig` for a player or a quotation."""
    source = re.sub(r"^from .*|^import .*", "", cell.source, flags=re.MULTILINE)
    if "remove-output" in cell.tags or "remove-cell" in cell.tags:
        return ""
    if re.search(r"\bframe_player\(", source) or 'f"> {line}"' in source:
        return "fig"
    return "tab" if re.search(r"(?<!def )\btable\(|\bMarkdown\(", source) else ""


def figure_of(cell: Cell) -> dict[str, str]:
    return dict((cell.metadata.get("mystnb") or {}).get("figure") or {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tables_and_players_are_numbered_like_figures(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not bare_tables(text), "put it into a ```{table} with a :name:"
    for name in re.findall(r"^```\{table\} \S.*\n(.*)$", text, re.MULTILINE):
        assert name.startswith(":name: tab")
    for cell in read_chapter(path).cells:
        figure, wanted = figure_of(cell), kind(cell)
        if wanted or figure:
            place = f"cell {cell.number}, line {cell.line}"
            assert figure.get("caption"), f"{place}: no caption"
            assert re.match(wanted or "fig|tab", figure.get("name", "")), place


def test_an_uncaptioned_table_is_found() -> None:
    rows = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert bare_tables(f"Text\n\n{rows}\n") == ["| a | b |"]
    for shown in ("{table} Sizes\n:name: tab-x", "{admonition} Paper says"):
        assert bare_tables(f"```{shown}\n{rows}```\n") == []
    assert kind(Cell(1, 1, "table(['a'], rows)", {})) == "tab"
    assert kind(Cell(1, 1, "frame_player(frames, labels)", {})) == "fig"
    assert kind(Cell(1, 1, "from plotting import frame_player, table", {})) == ""


def test_names_are_unique() -> None:
    names = [figure_of(cell).get("name") for c in chapters() for cell in c.cells]
    given = [name for name in names if name]
    assert len(set(given)) == len(given)


# A phone stacks panels, and the dark theme has no white paper.
PLACED = re.compile(r"\b(Left|Right|Middle|Top|Bottom)\b[:,]|\bwhite is zero\b")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_captions_name_panels_by_their_titles(path) -> None:
    """In italics: the title of a panel, or the label of its axis."""
    text = path.read_text(encoding="utf-8")
    captions = [
        figure_of(cell).get("caption", "")
        for cell in read_chapter(path).cells
        if not re.search(r"\bframe_player\(|\bsave_sheet\(", cell.source)
    ]
    captions += re.findall(
        r"^```\{(?:glue:)?figure\} .*\n(?::.*\n)*\n(.*)\n```$", text, re.MULTILINE
    )
    found = [caption for caption in captions if PLACED.search(caption)]
    assert not found, "a phone shows them elsewhere"
