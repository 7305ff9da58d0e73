"""Folded code says what it is, in one thin line, and stands where it does not disturb.

- The code of a picture comes *under* it: "Code for this figure". A cell that prepares
  one and shows nothing itself goes into the same fold. Where the code of a glued figure
  stands further down, a line under the figure leads there.
- What the package needs and the text does not: "Imports of the module", "Guards",
  "Details".
- The solution of an exercise: "Solution".

The notebook that one downloads has all cells where they were.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

NAMES = 3  # so many definitions are named in a line


def names_of(code: str) -> tuple[list[str], bool]:
    """What the statements of a cell define, and whether it imports anything."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    body = ast.parse(code).body
    names = [statement.name for statement in body if isinstance(statement, kinds)]
    return names, any(isinstance(s, ast.Import | ast.ImportFrom) for s in body)


def title_of_plumbing(code: str) -> str:
    """What a folded cell of the package is called."""
    names, imports = names_of(code)
    if not names and isinstance(ast.parse(code).body[0], ast.If):
        return "When it is run"
    if not names:
        return "Imports of the module" if imports else "Constants"
    checks = ("check", "_check", "_refuse", "__post_init__")
    title = "Guards" if all(name.startswith(checks) for name in names) else "Details"
    told = [name for name in names if not name.startswith("__")]
    more = ", …" if len(told) > NAMES else ""
    return f"{title}: {', '.join(told[:NAMES])}{more}" if told else title


def title_of_preparations(code: str) -> str:
    """What a folded cell is called that shows nothing and is not in the package."""
    imports = ast.Import | ast.ImportFrom
    only = all(isinstance(statement, imports) for statement in ast.parse(code).body)
    return "Imports for this page" if only else "Preparations"


def parts(
    cell: nodes.Node | None,
) -> tuple[HideCodeCellNode | None, nodes.Element | None]:
    """The fold of a cell, and what it shows besides."""
    if not isinstance(cell, nodes.container) or cell.get("nb_element") != "cell_code":
        return None, None
    fold = next((n for n in cell.children if isinstance(n, HideCodeCellNode)), None)
    shown = (n for n in cell.children if isinstance(n, nodes.Element) and n is not fold)
    return fold, next(shown, None)


def title_of_output(output: nodes.Element) -> str:
    """What the code under a figure, a table or a text is called."""
    names = [name for node in output.findall(nodes.figure) for name in node["names"]]
    if any(name.startswith("fig-") for name in names):
        return "Code for this figure"
    if next(output.findall(nodes.table), None):
        return "Code for this table"
    if next(output.findall(nodes.image), None) or next(
        output.findall(nodes.figure), None
    ):
        return "Code for this figure"
    return "Code for this output"


class NameFolds(SphinxPostTransform):
    """Name and place the folds that MyST-NB has just made; badges come later."""

    default_priority = 210
    formats = ("html",)

    def run(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        self.lead_to_code()
        for cell in list(self.document.findall(nodes.container)):
            fold, output = parts(cell)
            if fold is None or cell.parent is None:
                continue
            code = next(fold.findall(nodes.literal_block)).astext()
            if cell["hide_mode"] == "all":
                name, place = self.title_of_solution(cell), "solution"
            elif "tag_export" in cell["classes"]:
                name, place = title_of_plumbing(code), "plumbing"
            elif output is not None:
                name, place = title_of_output(output), "under"
                cell.remove(fold)
                cell.append(fold)
            elif self.joins_figure(cell, fold):
                continue
            elif fold["ids"]:
                name, place = "Code for the figure above", "plumbing"
            else:
                name, place = title_of_preparations(code), "plumbing"
            fold["prompt_show"], fold["classes"] = name, [f"fold-{place}"]

    def lead_to_code(self) -> None:
        """A line under each glued figure, to the code that glues it."""
        text = Path(self.document["source"]).read_text(encoding="utf-8")
        glued = re.findall(
            r"^```\{glue:figure\} (\S+)\n:name: (\S+)", text, re.MULTILINE
        )
        cells = [
            x for x in self.document.findall(nodes.container) if "cell" in x["classes"]
        ]
        figures = {f["names"][0]: f for f in self.document.findall(nodes.figure)}
        for key, name in glued:
            maker = next(x for x in cells if f'glue("{key}"' in x.astext())
            (parts(maker)[0] or maker)["ids"].append(f"code-{key}")
            line = nodes.paragraph(classes=["fold-link"])
            line += nodes.reference("", "Code for this figure", refid=f"code-{key}")
            parent = figures[name].parent
            parent.insert(parent.index(figures[name]) + 1, line)

    def title_of_solution(self, cell: nodes.Element) -> str:
        """The second part of a solution, after its words, is its code."""
        before = cell.previous_sibling()
        words = isinstance(before, nodes.Element) and (
            "sd-dropdown" in before["classes"] or parts(before)[0] is not None
        )
        return "Solution in code" if words else "Solution"

    def joins_figure(self, cell: nodes.Element, fold: HideCodeCellNode) -> bool:
        """Whether the code of a cell has gone into the fold of the figure after it."""
        after = cell.next_node(descend=False, siblings=True)
        below, output = parts(after)
        if below is None or output is None or after["hide_mode"] == "all":
            return False
        below[0:0] = fold.children
        cell.parent.remove(cell)
        return True


def open_fold(self: Any, node: HideCodeCellNode) -> None:
    """Called by Sphinx; a name that says the same, folded or not."""
    classes = " ".join(["fold", *node["classes"]])
    name = self.encode(node["prompt_show"])
    self.body.append(f'<details class="{classes}">\n<summary>{name}</summary>\n')
    for place in node["ids"]:  # who follows a link to what is inside finds it open
        self.body.append(f'<span id="{place}"></span>\n')


def close_fold(self: Any, _: HideCodeCellNode) -> None:
    """Called by Sphinx."""
    self.body.append("</details>\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx, after MyST-NB."""
    app.add_node(HideCodeCellNode, override=True, html=(open_fold, close_fold))
    app.add_post_transform(NameFolds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
