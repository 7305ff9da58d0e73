"""A chapter as a notebook that runs by itself, in any folder and in any notebook.

``python -m tools.standalone book/12_convolution.md`` writes `12_convolution.ipynb`.
Its first cell installs the package, or says how; the second brings along what the
chapter takes from the book's folder. What Sphinx's directives say becomes plain
Markdown.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import jupytext
import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell

from tools.book import ROOT
from tools.readable import places, readable

__all__ = ["NEEDS", "install", "main", "standalone"]

# The modules beside the chapters, each after those that it takes.
HELPERS = (
    "plotting",
    "literate",
    "explorables",
    "quick",
    "sheets",
    "page_model",
    "gpus",
    "verdicts",
)
OURS = re.compile(rf"^(?:from|import) ({'|'.join(HELPERS)})\b", re.MULTILINE)
RECORDED = re.compile(r"\brecorded\(")
CHECKOUT = re.compile(
    r'^(?:from|import) (?:tools|benchmarks)\b|Path\("\.\./|parents\[', re.MULTILINE
)
# A page that reads the rows of the studies finds them in the checkout like this.
STUDIES = 'Path(diffussm.__file__).parents[1] / "studies"'
NEEDS = ("diffussm[data,export,full,hub,show]", "ipywidgets", "pytest", "scipy")
NOTE = """\
This is a chapter of *Diffusion without attention*, as a notebook. It needs the package
`diffussm`; the first cell looks for it. Words in ⟨brackets⟩ are numbers that the cells
compute; the rendered book shows them."""
INSTALL = """\
# Where the package is missing, install it
import subprocess
import sys
from importlib.util import find_spec

if find_spec("diffussm") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, {wanted}], check=True)"""
SAY = """\
# Where the package is missing, say how to install it
from importlib.util import find_spec

if find_spec("diffussm") is None:
    raise ModuleNotFoundError(
        "This chapter needs the package diffussm. In a checkout of the book, run: "
        'pip install {wanted}'
    )"""
PRELUDE = '''\
# What the chapter takes from the book's folder
import json
import sys
import types


def bring(name, text):
    """Make a module of its text."""
    module = types.ModuleType(name)
    module.__file__ = f"{{name}}.py"
    sys.modules[name] = module
    exec(compile(text, f"{{name}}.py", "exec"), vars(module))
    return module


try:
    import myst_nb
except ImportError:  # only the rendered book needs the numbers in its sentences
    bring("myst_nb", """
from IPython.display import display as show

def glue(name, value, display=True):
    if display:
        show(value)
""")
{modules}'''
BRING_RECORDS = """
RECORDS = json.loads({records!r})
sys.modules["plotting"].recorded = lambda name: RECORDS.get(name, {{}})"""
BRING_STUDIES = """
import base64
import tempfile
import zlib
from pathlib import Path

BROUGHT = Path(tempfile.mkdtemp())
(BROUGHT / "results").mkdir()
for name, text in json.loads(zlib.decompress(base64.b64decode("{packed}"))).items():
    (BROUGHT / name).write_text(text, "utf-8")"""
FENCE = re.compile(r"^(?P<ticks>`{3,})\{(?P<name>[\w:]+)\} ?(?P<title>.*)$")


def standalone(path: Path, root: Path = ROOT) -> nbformat.NotebookNode:
    """The notebook of a chapter; `path` is its Markdown file.

    Raises:
        ValueError: it works on the checkout itself.
    """
    notebook = jupytext.read(path)
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    if CHECKOUT.search(code.replace(STUDIES, "")):
        raise ValueError(f"{path.name} reads files of the checkout: open it there")
    cells = [new_markdown_cell(NOTE), install(root), _prelude(code, root)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cells.append(_plain(cell.source, path.stem, root))
        else:
            shown = cell.metadata.pop("mystnb", {}).get("figure", {})
            folded = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
            if folded & set(cell.metadata.get("tags", [])):
                cell.metadata["jupyter"] = {"source_hidden": True}
            source = cell.source.replace(STUDIES, "BROUGHT")
            cells.append(new_code_cell(source, metadata=cell.metadata))
            if shown:
                words = f"*{places(root)[shown['name']].words}.* {shown['caption']}"
                cells.append(_plain(words, path.stem, root))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    done: nbformat.NotebookNode = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": kernel}
    )
    return done


def install(root: Path) -> nbformat.NotebookNode:
    """The cell that gets the package from the repository, if that has an address."""
    settings = yaml.safe_load((root / "_config.yml").read_text("utf-8"))
    package, *others = NEEDS
    if url := settings["repository"]["url"]:
        package += f" @ git+{url.rstrip('/')}@{settings['repository']['branch']}"
        wanted = ", ".join(json.dumps(one) for one in (package, *others))
        cell = new_code_cell(INSTALL.format(wanted=wanted))
    else:
        package = json.dumps(package.replace("diffussm", "."))
        cell = new_code_cell(SAY.format(wanted=" ".join((package, *others))))
    done: nbformat.NotebookNode = cell
    return done


def _prelude(code: str, root: Path) -> nbformat.NotebookNode:
    """The cell that brings the book's own helpers, and the records that are read."""
    used = set(OURS.findall(code))
    if used & {"explorables", "sheets"}:  # both draw
        used.add("plotting")
    modules = [
        f"bring({name!r}, {(root / 'book' / f'{name}.py').read_text('utf-8')!r})"
        for name in HELPERS
        if name in used
    ]
    if "plotting" in used and RECORDED.search(code):
        modules.append(_records(code, root / "benchmarks" / "results"))
    if STUDIES in code:
        modules.append(BRING_STUDIES.format(packed=_packed(root / "studies")))
    hidden = {"jupyter": {"source_hidden": True}}
    source = PRELUDE.format(modules="\n".join(modules))
    cell: nbformat.NotebookNode = new_code_cell(source, metadata=hidden)
    return cell


def _records(code: str, folder: Path) -> str:
    """What brings the records along whose names stand in the code."""
    files = [f for f in sorted(folder.glob("*.json")) if f'"{f.stem}"' in code]
    records = json.dumps({f.stem: json.loads(f.read_text("utf-8")) for f in files})
    return BRING_RECORDS.format(records=records)


def _packed(folder: Path) -> str:
    """The texts of a folder in one word."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    texts = {f.relative_to(folder).as_posix(): f.read_text("utf-8") for f in files}
    return base64.b64encode(zlib.compress(json.dumps(texts).encode(), 9)).decode()


def _plain(text: str, page: str, root: Path) -> nbformat.NotebookNode:
    """A cell of Markdown that any notebook can show."""
    attachments: dict[str, Any] = {}
    shown = "\n".join(_directives(text.splitlines(), page, root, attachments))
    shown = re.sub(r"^\([\w-]+\)=\n", "", shown, flags=re.MULTILINE)
    cell: nbformat.NotebookNode = new_markdown_cell(
        readable(shown, suffix="", root=root)
    )
    if attachments:
        cell["attachments"] = attachments
    return cell


def _directives(
    lines: list[str], page: str, root: Path, attachments: dict[str, Any]
) -> list[str]:
    """Lines with their directives as plain Markdown, those inside of others too."""
    said: list[str] = []
    while lines:
        opening = FENCE.match(lines[0])
        if not opening:
            said.append(lines[0])
            lines = lines[1:]
            continue
        end = lines.index(opening["ticks"])
        body, options = lines[1:end], {}
        while body and (option := re.match(r":([\w-]+): *(.*)", body[0])):
            options[option[1]] = option[2]
            body = body[1:]
        label = options.get("name", options.get("label", ""))
        number = places(root)[label].words if label in places(root) else ""
        inside = _directives(body, page, root, attachments)
        if opening["name"] == "literalinclude":
            inside = _included(root / "book" / opening["title"], options)
        if opening["name"] == "figure":
            inside = _picture(
                root / "book" / opening["title"], options, attachments, inside
            )
        said += SHOWN[opening["name"]](opening["title"], number, inside)
        lines = lines[end + 1 :]
    return said


def _included(file: Path, options: dict[str, str]) -> list[str]:
    """The part of a file that a page shows."""
    text = file.read_text("utf-8")
    if "pyobject" in options:
        node = next(
            n
            for n in ast.parse(text).body
            if getattr(n, "name", "") == options["pyobject"]
        )
        return (ast.get_source_segment(text, node) or "").splitlines()
    lines = text.splitlines()
    first, last = (options.get(k, "").strip("\"'") for k in ("start-at", "end-at"))
    start = next(i for i, line in enumerate(lines) if first in line)
    rest = list(enumerate(lines))[start:]
    end = next((i for i, line in rest if last and last in line), len(lines) - 1)
    return dedent("\n".join(lines[start : end + 1])).splitlines()


def _picture(
    file: Path, options: dict[str, str], attachments: dict[str, Any], caption: list[str]
) -> list[str]:
    encoded = base64.b64encode(file.read_bytes()).decode()
    attachments[file.name] = {"image/svg+xml": encoded}
    return [f"![{options.get('alt', '')}](attachment:{file.name})", "", *caption]


SHOWN: dict[str, Callable[[str, str, list[str]], list[str]]] = {
    "math": lambda _, number, body: [
        "$$",
        *body,
        *([rf"\tag{{{number.strip('()')}}}"] if number else []),
        "$$",
    ],
    "dropdown": lambda title, _, body: [
        f"<details><summary>{title}</summary>",
        "",
        *body,
        "",
        "</details>",
    ],
    "admonition": lambda title, _, body: [
        f"> **{title}**",
        ">",
        *(f"> {line}" for line in body),
    ],
    "literalinclude": lambda _, __, body: ["```", *body, "```"],
    "table": lambda title, number, body: [f"*{number}.* {title}", "", *body],
    "figure": lambda _, number, body: [*body[:2], f"*{number}.*", *body[2:]],
    "glue:figure": lambda _, number, body: [f"*{number}, drawn further down.*", *body],
}


def main(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    if not arguments:
        print("standalone: name a chapter, such as book/12_convolution.md")
        return 2
    for name in arguments:
        path = Path(name)
        try:
            nbformat.write(standalone(path), f"{path.stem}.ipynb")
        except (OSError, ValueError) as error:
            print(f"standalone: {error}", file=sys.stderr)
            return 2
        print(f"wrote {path.stem}.ipynb")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
