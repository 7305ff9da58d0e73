"""Forget the outputs of chapters whose imported code has changed.

The book's execution cache compares the code of a chapter, not the code that it imports.
This compares the rest: the modules of the package that a chapter imports, directly or
not, the book's plotting helpers, and the pinned requirements. Where they differ from
the last time, the chapter's outputs are removed: it runs again.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

from tools.book import ROOT, Chapter, chapters

__all__ = ["forget_changed", "fingerprint"]


def _imported_files(root: Path, source: str, package: str | None = None) -> set[Path]:
    """The files of this project that a piece of code imports, anywhere."""
    found: set[Path] = set()
    try:
        tree = ast.parse(source)
    except SyntaxError:  # an IPython command in a chapter: what it needs is not known
        return set((root / "diffussm").glob("*.py"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.name if alias.name != "diffussm" else "diffussm.*"
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                filter(None, [package if node.level else None, node.module])
            )
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


def fingerprint(chapter: Chapter, root: Path = ROOT) -> str:
    """A digest of everything outside a chapter that its outputs depend on."""
    own = root / "diffussm" / f"{chapter.module}.py"
    pending = set[Path]().union(
        *(_imported_files(root, cell.source) for cell in chapter.cells)
    )
    files: set[Path] = set()
    while pending:
        path = pending.pop()
        files.add(path)
        pending |= (
            _imported_files(root, path.read_text(encoding="utf-8"), path.parent.name)
            - files
        )
    digest = hashlib.sha256((root / "requirements.txt").read_bytes())
    for path in sorted(files - {own}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def forget_changed(root: Path = ROOT) -> list[str]:
    """Remove the outputs of chapters whose imports have changed; returns names."""
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
        print(f"cache: what book/{name}.md imports has changed, it will run again")
