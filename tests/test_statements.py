"""What the pages may say: nothing that another run on a busier machine would say
otherwise.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import jupytext
import pytest

from tools.book import chapters

CLOCKS = {
    "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
    "thread_time", "time_ns",
    "default_timer", "timeit", "elapsed_time", "time_by_kind", "getrusage",
}  # fmt: skip
# What the log of a run and a measurement hold beside their results
TIMINGS = {"seconds", "images_per_second", "seconds_left", "data_wait"}
MAGIC = re.compile(r"^\s*%%?(time|timeit|prun)\b", re.MULTILINE)


def clocks(tree: ast.AST) -> Iterator[ast.AST]:
    """Every place where a cell reads a clock, or calls something that does."""
    for node in ast.walk(tree):
        name = (
            node.attr
            if isinstance(node, ast.Attribute)
            else node.id
            if isinstance(node, ast.Name)
            else ""
        )
        if name in CLOCKS or (
            isinstance(node, ast.Attribute) and ast.unparse(node) == "time.time"
        ):
            yield node


def published(tree: ast.AST) -> list[str]:
    """The clocks of a cell whose value can reach the page: all but those that only end
    a loop or a wait.

    A deadline may be a variable; it must then be read in the tests of loops and
    conditions only. A profile may be asked which kinds of work it found, by a
    comparison with zero.
    """
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.While | ast.If | ast.Assert):
            harmless |= set(ast.walk(node.test))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            harmless |= set(ast.walk(node))
        elif isinstance(node, ast.SetComp) and all(c.ifs for c in node.generators):
            harmless |= {inner for c in node.generators for inner in ast.walk(c)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) for target in node.targets
        ):
            names = {
                target.id for target in node.targets if isinstance(target, ast.Name)
            }
            uses = [
                n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names
            ]
            if all(isinstance(n.ctx, ast.Store) or n in harmless for n in uses):
                harmless |= set(ast.walk(node.value))
    return [
        f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)}"
        for node in clocks(tree)
        if node not in harmless
    ]


def test_the_search_tells_a_published_clock_from_a_deadline() -> None:
    for text in (
        "start = time.perf_counter()\nwork()\nprint(time.perf_counter() - start)",
        "glue('x', timeit.timeit(work))",
        "kinds = time_by_kind(job)\nprint(kinds)",
        "from time import perf_counter as now\nprint(perf_counter())",
        "end = time.monotonic()\nwhile time.monotonic() < end + 1: pass\nprint(end)",
        "glue('x', time.time())",
    ):
        assert published(ast.parse(text)), text
    for text in (
        "deadline = time.monotonic() + 300\nwhile time.monotonic() < deadline and "
        "busy():\n    pass",
        "found = {kind for kind, spent in time_by_kind(job).items() if spent > "
        "0}\nprint(found)",
        "times = [3]\nprint(times)",
    ):
        assert not published(ast.parse(text)), text


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.path.stem)
def test_no_clock_reaches_the_page(chapter) -> None:
    """A busy machine publishes the same sentences as a quiet one: timings come from
    `benchmarks/results`.
    """
    faults = []
    # names of what a benchmark has measured on a named machine
    tables = re.findall(
        r"^(\w+) = recorded\(", "\n".join(c.source for c in chapter.cells), re.MULTILINE
    )
    for number, cell in enumerate(jupytext.read(chapter.path).cells):
        if cell.cell_type != "code":
            continue
        if MAGIC.search(cell.source):
            faults.append(f"cell {number}: a timing magic")
            continue
        tree = ast.parse(
            re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.MULTILINE)
        )
        if "export" in cell.metadata.get("tags", []):
            # the package may look at a clock: its trainer logs images per second
            continue
        faults += [f"cell {number}, {fault}" for fault in published(tree)]
        of_records = ["recorded\\(", "gpu\\.rows\\(", "benchmarks", *tables]
        if not re.search("|".join(of_records), cell.source):
            looked_up = {
                ast.unparse(n.slice).strip("'")
                for n in ast.walk(tree)
                if isinstance(n, ast.Subscript)
            }
            faults += [
                f"cell {number}: shows {key!r} of the log"
                for key in sorted(looked_up & TIMINGS)
            ]
    assert not faults, "\n".join(faults)
