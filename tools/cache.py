"""Forget the outputs of chapters whose imported code or data have changed.

The book's execution cache compares the code of a chapter, not the code that it imports.
This compares the rest: the modules of the package that a chapter imports, directly or
not, the book's plotting helpers, the records and data that they read, and the pinned
requirements. Where they differ from the last time, the chapter's outputs are removed:
it runs again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from pathlib import Path

from tools.book import ROOT, Chapter, chapters

__all__ = ["forget_changed", "fingerprint"]


def _needed_by(root: Path, source: str, package: str = "") -> set[Path]:
    """This project's files that code names: what it imports, anywhere, and data."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # an IPython command in a chapter: what it needs is not known
        return set((root / "diffussm").glob("*.py"))
    found = _data(root, tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.name if alias.name != "diffussm" else "diffussm.*"
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package * (node.level > 0), node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    for name in names:
        here = [
            root / folder / f"{name.replace('.', '/')}.py" for folder in ("book", ".")
        ]
        files = [path for path in here if path.is_file()]
        found |= set(files)
        if files:
            continue
        if name.count(".") == 1 and name.startswith(
            "diffussm."
        ):  # the package's own names live anywhere
            found |= set((root / "diffussm").glob("*.py"))
    return found


def _data(root: Path, tree: ast.Module) -> set[Path]:
    """The data of the package, the studies and the records that strings name."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    places = [*(root / "diffussm").iterdir(), root / "studies"]
    found = {
        file
        for place in places
        if place.name in strings
        for file in (place, *place.rglob("*"))
        if file.is_file()
    }
    if "recorded" in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}:
        records = (root / "benchmarks" / "results").glob("*.json")
        found |= {record for record in records if record.stem in strings}
    return found


@functools.cache  # many chapters import the same modules
def _needed_by_file(root: Path, path: Path) -> set[Path]:
    if path.suffix != ".py":
        return set()
    return _needed_by(root, path.read_text(encoding="utf-8"), path.parent.name)


def fingerprint(chapter: Chapter, root: Path = ROOT) -> str:
    """A digest of everything outside a chapter that its outputs depend on."""
    own = root / "diffussm" / f"{chapter.module}.py"
    pending = set[Path]().union(
        *(_needed_by(root, cell.source) for cell in chapter.cells)
    )
    files: set[Path] = set()
    while pending:
        path = pending.pop()
        files.add(path)
        pending |= _needed_by_file(root, path) - files
    digest = hashlib.sha256((root / "requirements.txt").read_bytes())
    for path in sorted(files - {own}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def forget_changed(root: Path = ROOT) -> list[str]:
    """Remove the outputs of chapters that need what has changed; returns names."""
    build = root / "_build"
    ledger = build / "imported_code.json"
    old: dict[str, str] = json.loads(ledger.read_text()) if ledger.exists() else {}
    new = {chapter.path.stem: fingerprint(chapter, root) for chapter in chapters(root)}
    changed = [name for name, digest in new.items() if old.get(name) != digest]
    forgotten = []
    if changed and (build / ".jupyter_cache").is_dir():
        from jupyter_cache import get_cache  # takes seconds, and is seldom needed

        cache = get_cache(str(build / ".jupyter_cache"))
        for record in cache.list_cache_records():
            if Path(record.uri).stem in changed:
                cache.remove_cache(record.pk)
                forgotten.append(Path(record.uri).stem)
    for name in changed:  # without this file the page is read, and so executed, again
        (build / ".doctrees" / "book" / f"{name}.doctree").unlink(missing_ok=True)
    build.mkdir(exist_ok=True)
    ledger.write_text(json.dumps(new, indent=1) + "\n")
    return sorted(set(forgotten))


if __name__ == "__main__":
    for name in forget_changed():
        print(f"cache: what book/{name}.md needs has changed, it will run again")
