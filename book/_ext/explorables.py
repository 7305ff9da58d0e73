"""The scripts in `book/_js`, as one that also works where a page is opened as a file.

Browsers load modules only from a server, and a worker from nowhere else either. So the
modules become the body of one function, `bundle`; a page calls it, and a worker is made
of its text. The form that they may have is narrow: `import { a, b } from "./x.js";` on
one line, and `export` before a function, a class or a const.
"""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

SCRIPT = "explorables.js"
ENTRY = "main"
IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";$', re.MULTILINE)
EXPORT = re.compile(
    r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.MULTILINE
)


def bundle(folder: Path) -> str:
    """The modules of a folder in one script, each after those that it imports.

    Raises:
        ValueError: a module does not have the form, or imports what is not there.
    """
    texts = {file.stem: file.read_text("utf-8") for file in folder.glob("*.js")}
    needs = {name: {m[2] for m in IMPORT.finditer(t)} for name, t in texts.items()}
    exports = {name: EXPORT.findall(text) for name, text in texts.items()}
    for name, text in texts.items():
        for wanted, source in IMPORT.findall(text):
            missing = set(wanted.split(", ")) - set(exports.get(source, []))
            if missing:
                raise ValueError(f"{name}.js: {source}.js has no {sorted(missing)}")
        rest = EXPORT.sub("", IMPORT.sub("", text))
        odd = re.search(r"^(import|export)\b.*", rest, re.MULTILINE)
        if odd:
            raise ValueError(f"{name}.js: cannot bundle {odd[0]!r}")
    parts = []
    for name in TopologicalSorter(needs).static_order():
        body = IMPORT.sub(r"const { \1 } = modules.\2;", texts[name])
        body = EXPORT.sub("", body)
        given = ", ".join(exports[name])
        parts.append(
            f"modules.{name} = (() => {{\n{body}\nreturn {{ {given} }};\n}})();\n"
        )
    return (
        '"use strict";\nfunction bundle(start) {\nconst modules = {};\n'
        + "\n".join(parts)
        + "\nmodules[start].start();\n}\n"
        + f'bundle("{ENTRY}");\n'
    )


def write(app: Sphinx) -> None:
    """Called by Sphinx before it reads."""
    target = Path(app.outdir, "_static", SCRIPT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(bundle(Path(app.srcdir, "book", "_js")), encoding="utf-8")


def ask_for_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    """Load the script on pages that have something for it."""
    if tree and any(
        'class="explorable"' in n.astext() for n in tree.findall(nodes.raw)
    ):
        app.add_js_file(SCRIPT, loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    app.connect("html-page-context", ask_for_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
