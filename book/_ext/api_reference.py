"""The reference of the package, made of its docstrings; nothing is imported for it.

The directive `api` writes a section for each module, in the order of the book, with the
signature and the docstring of every public name. A name of the package in a chapter's
text becomes a link to its entry, the first time in each section.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from tools.book import Chapter

# What a docstring names as its source, and the role that refers to it.
ROLES = {"ch": "ref", "eq": "eq", "fig": "numref", "tab": "numref"}
HEADINGS = ("Args", "Attributes", "Raises", "Returns", "Yields")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> list[str]:
    """The names in a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def linked(text: str, known: set[str]) -> str:
    """A text in which labels of the book are references."""

    def role(label: str) -> str:
        return f"{{{ROLES[label.partition('-')[0]]}}}`{label}`"

    found = rf"(?<![\w`-])(?:{'|'.join(ROLES)})-[a-z][\w-]+"
    return re.sub(found, lambda m: role(m[0]) if m[0] in known else m[0], text)


def markdown(docstring: str) -> str:
    """A docstring in Google's style as Markdown: its sections become lists."""
    lines, inside = [], False
    for line in docstring.splitlines():
        heading = line.rstrip(":") if line.endswith(":") else ""
        item = re.match(r"    (\*{0,2}[\w., ]+): (.*)", line)
        if heading in HEADINGS:
            lines += ["", f"**{heading}**", ""]
            inside = heading not in ("Returns", "Yields")
        elif inside and item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif inside and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line.strip()
            lines.append(line.strip() if line.startswith("    ") else line)
    return "\n".join(lines)


def decorators(node: Definition) -> list[str]:
    """The decorators, without what they are called with."""
    return [ast.unparse(d).partition("(")[0] for d in node.decorator_list]


def signature(node: Definition) -> str:
    """What is written in brackets, and what comes back."""
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                member.args.args = member.args.args[1:]
                return f"({ast.unparse(member.args)})"
        if "dataclass" not in decorators(node):
            return ""
        fields = (ast.unparse(f) for f in node.body if isinstance(f, ast.AnnAssign))
        return f"({', '.join(f for f in fields if 'ClassVar' not in f)})"
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){back}"


def members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public methods and properties that have a docstring."""
    for member in node.body:
        if (
            isinstance(member, ast.FunctionDef)
            and member.name[0] != "_"
            and ast.get_docstring(member)
            and "overload" not in decorators(member)
            and not any(name.endswith(".setter") for name in decorators(member))
        ):
            yield member


def entry(node: Definition) -> str:
    """One definition in MyST."""
    text = markdown(ast.get_docstring(node) or "")
    if not isinstance(node, ast.ClassDef):
        return directive("function", node.name + signature(node), text)
    inner = []
    for member in members(node):
        kind, said = "method", signature(member)
        if {"property", "functools.cached_property"} & set(decorators(member)):
            kind, said = "property", ""
        elif not {"staticmethod", "classmethod"} & set(decorators(member)):
            member.args.args = member.args.args[1:]
            said = signature(member)
        text_of = markdown(ast.get_docstring(member) or "")
        inner.append(directive(kind, f"{member.name}{said}", text_of, fence=4))
    whole = "\n\n".join([text, *inner])
    return directive("class", node.name + signature(node), whole, fence=5)


def directive(kind: str, argument: str, content: str, fence: int = 4) -> str:
    """A directive of Sphinx's domain for Python."""
    ticks = "`" * fence
    argument = " ".join(argument.split())
    return f"{ticks}{{py:{kind}}} {argument}\n\n{content}\n{ticks}"


def definitions(source: str) -> list[str]:
    """The public names that a cell defines, methods of a class elsewhere left out."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, Definition)
        and node.name[0] != "_"
        and "method_of" not in decorators(node)
    ]


class ApiReference(SphinxDirective):
    """All modules of the package, part by part."""

    def run(self) -> list[nodes.Node]:
        """Called by the parser."""
        from tools.book import labels
        from tools.overview import parts

        root = Path(self.env.srcdir)
        texts = [p.read_text(encoding="utf-8") for p in (root / "book").glob("*.md")]
        self.known = {label for text in texts for label in labels(text)}
        found: list[nodes.Node] = []
        for caption, chapters in [*parts(root), *parts(root, numbered=False)]:
            part = nodes.section("", nodes.title("", caption))
            part["ids"] = [nodes.make_id(f"api {caption}")]
            for chapter in chapters:
                if chapter.module:
                    path = root / "diffussm" / f"{chapter.module}.py"
                    self.env.note_dependency(str(path))
                    part += self.module(path, Path(chapter.name).stem)
            if len(part) > 1:
                found.append(part)
        return found

    def module(self, path: Path, page: str) -> nodes.section:
        """One module's names, in the order of the file."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = f"diffussm.{path.stem}"
        section = nodes.section("", nodes.title("", "", nodes.literal("", name)))
        section["ids"] = [nodes.make_id(f"api {name}")]
        names = public(tree)
        shown = [
            entry(node)
            for node in tree.body
            if isinstance(node, Definition) and node.name in names
        ]
        text = "\n\n".join([f"```{{py:module}} {name}\n```", *shown])
        section += self.parse_text_to_nodes(linked(text, self.known))
        for sign in section.findall(addnodes.desc_signature):
            if sign.parent["objtype"] in ("function", "class"):
                cell = f"{page}.html#def-{sign['fullname']}"
                link = nodes.reference("", "chapter", refuri=cell, internal=True)
                link["classes"].append("api-chapter")
                sign += link
        return section


@lru_cache
def _chapters(root: Path) -> dict[str, Chapter]:
    """All chapters by their file."""
    from tools.overview import parts

    every = [*parts(root), *parts(root, numbered=False)]
    return {chapter.name: chapter for _, part in every for chapter in part}


class LinkNames(SphinxTransform):
    """Link the package's names in a chapter's text to their entries."""

    default_priority = 500

    def apply(self, **_: object) -> None:
        """Called by Sphinx, once a page."""
        chapter = _chapters(Path(self.env.srcdir)).get(f"{self.env.docname}.md")
        if chapter is None:
            return
        module_of = {}
        for cell in chapter.cells:
            source = re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.MULTILINE)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and (
                    (module := node.module or "").startswith("diffussm.")
                ):
                    module_of |= dict.fromkeys((a.name for a in node.names), module)
            if chapter.module and "export" in cell.tags:
                own = f"diffussm.{chapter.module}"
                module_of |= dict.fromkeys(definitions(source), own)
        seen: set[tuple[int, str]] = set()
        for literal in list(self.document.findall(nodes.literal)):
            name, parent = literal.astext(), literal.parent
            section = next(
                (n for n in ancestors(literal) if isinstance(n, nodes.section)), None
            )
            key = (id(section), name)
            if (
                name in module_of
                and key not in seen
                and isinstance(parent, nodes.paragraph | nodes.emphasis | nodes.strong)
            ):
                seen.add(key)
                literal.replace_self(
                    addnodes.pending_xref(
                        "",
                        literal.deepcopy(),
                        refdomain="py",
                        reftype="obj",
                        reftarget=f"{module_of[name]}.{name}",
                        refdoc=self.env.docname,
                        refwarn=False,
                    )
                )


def ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    """A node's parent, and so on."""
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.add_directive("api", ApiReference)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
