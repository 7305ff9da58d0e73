"""The reference of the package, made of its docstrings; nothing is imported for it.

The directive `api` writes a section for each module, in the order of the book, with the
signature and the docstring of every public name. A name of the package in a chapter's
text becomes a link to its entry, the first time in each section.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from tools.book import Chapter

# What a docstring names as its source, and the role that refers to it.
ROLES = {"ch": "ref", "eq": "eq", "fig": "numref", "tab": "numref"}
NAMES = (addnodes.desc_name, addnodes.desc_addname)
HEADINGS = ("Args", "Attributes", "Raises", "Returns", "Yields")
SHORT = 100  # letters of a value that is shown
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> list[str]:
    """The names in a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


class Break(nodes.inline):
    """Where a long name may go on in the next line; a copy has nothing there."""


def with_breaks(node: nodes.Element) -> None:
    """Let a browser break the names in a node after each `_` and `.`."""
    for text in list(node.findall(nodes.Text)):
        first, *others = re.split(r"(?<=[_.])(?=\w)", text.astext())
        pieces: list[nodes.Node] = [nodes.Text(first)]
        for piece in others:
            pieces += [Break(), nodes.Text(piece)]
        text.parent.replace(text, pieces)


def linked(text: str, known: set[str]) -> str:
    """A text in which labels of the book are references.

    The number of an equation comes in brackets, so those around it go.
    """

    def role(label: str) -> str:
        return f"{{{ROLES[label.partition('-')[0]]}}}`{label}`"

    def bare(found: re.Match[str]) -> str:
        return found[1] if found[1] in known else found[0]

    text = re.sub(r"\((?:equation\s+)?(eq-[\w-]+)\)", bare, text)
    found = rf"(?<![\w`-])(?:{'|'.join(ROLES)})-[a-z][\w-]+"
    return re.sub(found, lambda m: role(m[0]) if m[0] in known else m[0], text)


def markdown(docstring: str) -> str:
    """A docstring in Google's style as Markdown: its sections become lists."""
    lines, inside = [], False
    docstring = docstring.replace(" -> ", " → ")  # which no line break cuts
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


class Plain(ast.NodeTransformer):
    """A signature as a reader needs it: no quotes around types, and real defaults.

    `values`: what private names of the module stand for.
    """

    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """A private name becomes what it stands for."""
        return self.values.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> Any:
        """The default of a field with a range or a factory; None: it has none."""
        match node:
            case ast.Call(func=ast.Name("bounded"), args=[ast.Name("MISSING")]):
                return None
            case ast.Call(func=ast.Name("bounded"), args=[default]):
                return self.visit(default)
            case ast.Call(
                func=ast.Name("field"),
                keywords=[ast.keyword("default_factory", ast.Name(kind))],
            ):
                return ast.Name({"list": "[]", "dict": "{}"}.get(kind, f"{kind}()"))
        return self.generic_visit(node)

    def annotation(self, node: ast.expr | None) -> ast.expr | None:
        """A type without quotes; the words of a Literal keep theirs."""
        match node:
            case ast.Constant(str(text)):
                return self.annotation(ast.parse(text, mode="eval").body)
            case ast.Subscript(ast.Name("Literal")):
                return node
            case ast.Subscript():
                node.slice = self.annotation(node.slice) or node.slice
            case ast.Tuple() | ast.List():
                node.elts = [self.annotation(one) or one for one in node.elts]
            case ast.BinOp():
                node.left = self.annotation(node.left) or node.left
                node.right = self.annotation(node.right) or node.right
        return self.visit(node) if node else None

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """A parameter with its type."""
        node.annotation = self.annotation(node.annotation)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        """A field of a dataclass."""
        node.annotation = self.annotation(node.annotation) or node.annotation
        node.value = self.visit(node.value) if node.value else None
        return node


def constants(path: Path) -> dict[str, ast.expr]:
    """What private names and constants in a module stand for, where that is short."""
    found: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=value):
                kept = name[0] == "_" or (name.isupper() and len(name) > 1)  # no T
                if kept and len(ast.unparse(value)) <= 60:
                    found[name] = value
            case ast.ImportFrom(module=str(module)) if module.startswith("diffussm."):
                if any(one.name.isupper() for one in node.names):
                    other = constants(path.with_name(f"{module[9:]}.py"))
                    names = {one.name for one in node.names} & other.keys()
                    found |= {name: other[name] for name in names}
    return found


def signature(node: Definition, values: dict[str, ast.expr] | None = None) -> str:
    """What is written in brackets, and what comes back."""
    plain = Plain(values or {})
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                member.args.args = member.args.args[1:]
                return f"({ast.unparse(plain.visit(member.args))})"
        named = "NamedTuple" in map(ast.unparse, node.bases)
        if not named and "dataclass" not in decorators(node):
            return ""
        found = [f for f in node.body if isinstance(f, ast.AnnAssign)]
        fields = (ast.unparse(plain.visit(f)) for f in found)
        return f"({', '.join(f for f in fields if 'ClassVar' not in f)})"
    returns = plain.annotation(node.returns)
    back = f" -> {ast.unparse(returns)}" if returns else ""
    if "contextmanager" in decorators(node):  # what it yields is what `as` names
        back = back.replace(" Iterator[", " AbstractContextManager[")
    return f"({ast.unparse(plain.visit(node.args))}){back}"


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


def remarks(source: str) -> dict[int, str]:
    """The comments of a module by their line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return {token.start[0]: token.string.lstrip("# ") for token in found}


def constant(node: ast.stmt, names: list[str], said: dict[int, str]) -> str:
    """A constant or a type in MyST, with its value if that is short; else ""."""
    match node:
        case ast.Assign(targets=[ast.Name(name)], value=ast.expr() as value):
            kind = ""
        case ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value):
            kind = f":type: {ast.unparse(node.annotation)}\n"
        case _:
            return ""
    of_types = isinstance(value, ast.Subscript | ast.BinOp)
    shown = ast.unparse((of_types and Plain({}).annotation(value)) or value)
    if name not in names or shown.startswith("TypeVar("):
        return ""
    options = kind + (f":value: {shown}\n" if len(shown) <= SHORT else "")
    text = said.get(node.lineno, "")
    return directive("data", name, text[:1].upper() + text[1:], options=options)


def entry(node: Definition, values: dict[str, ast.expr] | None = None) -> str:
    """One definition in MyST; `values`: what private names stand for."""
    text = markdown(ast.get_docstring(node) or "")
    if not isinstance(node, ast.ClassDef):
        return directive("function", node.name + signature(node, values), text)
    inner = []
    for member in members(node):
        how = set(decorators(member))
        if "staticmethod" not in how:  # self, or the class
            member.args.args = member.args.args[1:]
        kind, said, options = "method", signature(member, values), ""
        if {"property", "cached_property", "functools.cached_property"} & how:
            kind, options = "property", f":type: {said.partition(' -> ')[2]}\n"
            said = ""
        elif {"staticmethod", "classmethod"} & how:
            kind = "staticmethod" if "staticmethod" in how else "classmethod"
        text_of = markdown(ast.get_docstring(member) or "")
        inner.append(directive(kind, f"{member.name}{said}", text_of, options=options))
    taken = signature(node, values)
    if node.bases and not taken:  # then it takes what its base takes
        inner.insert(0, f"Base: {', '.join(f'`{ast.unparse(b)}`' for b in node.bases)}")
    whole = "\n\n".join([text, *inner])
    return directive("class", node.name + taken, whole, fence=5)


def directive(
    kind: str, argument: str, content: str, fence: int = 4, options: str = ""
) -> str:
    """A directive of Sphinx's domain for Python."""
    ticks = "`" * fence
    argument = " ".join(argument.split())
    return f"{ticks}{{py:{kind}}} {argument}\n{options}\n{content}\n{ticks}"


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
        # what the command line says for a word of its docstrings
        parsing = constants(root / "diffussm" / "parsing.py")
        self.words = {"DEVICE": ast.literal_eval(parsing["_DEVICE"])}
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
        source = path.read_text(encoding="utf-8")
        tree, comments = ast.parse(source), remarks(source)
        name, names, values = f"diffussm.{path.stem}", public(tree), constants(path)
        section = nodes.section("", nodes.title("", "", nodes.literal("", name)))
        section["ids"] = [nodes.make_id(f"api {name}")]
        shown = [f"```{{py:module}} {name}\n```"]
        for node in tree.body:
            if not isinstance(node, Definition):
                shown.append(constant(node, names, comments))
            elif node.name in names:
                shown.append(entry(node, values))
        text = "\n\n".join(filter(None, shown))
        for word, said in self.words.items():
            text = re.sub(rf"\b{word}\b", said, text)
        section += self.parse_text_to_nodes(linked(text, self.known))
        with_breaks(section[0])
        for label in list(section.findall(lambda node: isinstance(node, NAMES))):
            with_breaks(label)
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
        module_of: dict[str, str] = {}
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


def pass_by(*_: object) -> None:
    """There is nothing to close."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.add_directive("api", ApiReference)
    app.add_node(Break, html=(lambda page, _: page.body.append("<wbr>"), pass_by))
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
