"""A folder that needs no package.

Generated from book/61_one_file.md by `make export`: edit there.
"""

import ast
from importlib.resources import files
from pathlib import Path

from diffussm.guards import refuse

__all__ = ["self_contained_code", "COMPONENT_FILE", "COMPONENT_CODE"]


class _Source:
    """A module of this package, taken apart into what it defines and what it
    imports.
    """

    def __init__(self, module: str) -> None:
        text = (files("diffussm") / f"{module}.py").read_text(encoding="utf-8")
        self.lines, tree = text.splitlines(), ast.parse(text)
        self.title = f"# {module}: {(ast.get_docstring(tree) or '').splitlines()[0]}"
        self.defined: dict[str, ast.stmt] = {}
        # name -> (from where or "", what), as often as it is imported
        self.imported: dict[str, list[tuple[str, str]]] = {}
        self.ours: dict[str, str] = {}  # name -> the module of this package it is from
        for node in tree.body:
            self._file(node)

    def _file(self, node: ast.stmt) -> None:
        """Enter a statement under the names that it makes."""
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            self.defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            self.defined |= {ast.unparse(target): node for target in targets}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self._file_import(node)

    def _file_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Enter what is imported, from this package or from elsewhere."""
        origin = str(node.module) if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            if origin.startswith("diffussm."):
                self.ours[name] = origin.removeprefix("diffussm.")
            else:
                self.imported.setdefault(name, []).append((origin, ast.unparse(alias)))

    def text(self, name: str) -> str:
        """A definition as it is written, with decorators and the comment above it."""
        node = self.defined[name]
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)])
        while self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : node.end_lineno])


_LATER = [
    "fft_convolution:FFT",
    "two_level:vandermonde_two_level",
    "sharing:save_pipeline",
    "sharing:load_pipeline",
    "sharing:load_run",
]


class _Needed:
    """What a name needs: definitions by module, and imports from other libraries."""

    def __init__(self) -> None:
        self.sources: dict[str, _Source] = {}
        self.chosen: dict[str, str] = {}  # name -> module
        self.imports: dict[str, set[str]] = {}  # from where or "" -> what

    def add(self, module: str, name: str) -> None:
        """Look a name up, and all that its definition uses."""
        if module not in self.sources:
            self.sources[module] = _Source(module)
        source = self.sources[module]
        if name in source.ours:
            self.add(source.ours[name], name)
        for origin, what in source.imported.get(name, []):
            self.imports.setdefault(origin, set()).add(what)
        if name in source.defined and self.chosen.get(name) != module:
            self._define(module, name)

    def _define(self, module: str, name: str) -> None:
        """Take a definition, and look up what it uses."""
        other = self.chosen.setdefault(name, module)
        refuse(
            other != module, f"{other} and {module} define {name}: rename", RuntimeError
        )
        for node in ast.walk(self.sources[module].defined[name]):
            if isinstance(node, ast.Name):
                self.add(module, node.id)
            elif isinstance(node, ast.Constant) and node.value in _LATER:
                self.add(*node.value.split(":"))

    def order(self, modules: list[str]) -> list[str]:
        """The modules that are needed for these, in the order of their imports."""
        placed: dict[str, None] = {}

        def place(module: str) -> None:
            if module in self.sources and module not in placed:
                for other in self.sources[module].ours.values():
                    place(other)
                placed[module] = None

        for module in modules:
            place(module)
        return list(placed)

    def part(self, module: str) -> str:
        """The definitions that are needed of a module, as they are written there."""
        source = self.sources[module]
        names = [name for name in source.defined if self.chosen.get(name) == module]
        texts = [f"{source.text(name)}\n" for name in names]
        return "\n\n".join([f"\n{source.title}\n", *texts]) if names else ""


def self_contained_code(
    module: str = "pipeline", name: str = "DiffuSSMPipeline"
) -> str:
    """One file with a class of this package and all that it needs of it, and nothing
    that it does not need.

    Raises RuntimeError if two of the modules give different things the same name.
    """
    if __name__.startswith("diffusers_modules."):
        return Path(__file__).read_text(encoding="utf-8")  # this is that file
    needed = _Needed()
    needed.add(module, name)
    order = needed.order([module, *needed.sources])
    title = _HEAD.format(name=name, modules=", ".join(order))
    head = [title, *_imports(needed.imports), ""]
    parts = [needed.part(other) for other in order]
    # in the file, a function of a later chapter is one of this file
    home = "home = import_module(f\"{__package__ or 'diffussm'}.{module}\")"
    return "\n".join([*head, *filter(None, parts)]).replace(
        home, "home = import_module(__name__)"
    )


_HEAD = '''\
"""{name}, with all that it needs, in one file.

DiffuSSM: diffusion models without attention.
Written out of modules of the package diffussm:
{modules}.
License: Apache-2.0.
"""
'''


def _imports(imports: dict[str, set[str]]) -> list[str]:
    plain = [f"import {what}" for what in sorted(imports.get("", ()))]
    origins = sorted(origin for origin in imports if origin)
    return plain + [f"from {o} import {', '.join(sorted(imports[o]))}" for o in origins]


COMPONENT_FILE = "modeling_diffussm.py"
# no line of it begins with an import: diffusers would look for its package here
COMPONENT_CODE = (
    '"""The denoiser of this pipeline; its code is in pipeline.py, beside this '
    'folder."""\n\n'
    "from diffusers_modules.local.pipeline import Denoiser\n\n"
    '__all__ = ["Denoiser"]\n'
)
