"""The pages say what the records of GPUs hold, whichever GPUs these are of."""

from __future__ import annotations

import builtins
import dis
import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import IPython.display
import jupytext
import matplotlib as mpl
import myst_nb
import pytest

from benchmarks.gpu import SECTIONS
from tools.book import ROOT

sys.path.insert(0, str(ROOT / "book"))
import gpus  # type: ignore[import-not-found]

import plotting  # type: ignore[import-not-found]

RESULTS = ROOT / "benchmarks" / "results"
FILES = "gpu", "gpu_h200"
FIRST, LATER = (json.loads((RESULTS / f"{n}.json").read_text()) for n in FILES)
FUSED = {"attention": "fused attention"}


# --- the cells of a page that a record can change


def taken(code: CodeType) -> set[str]:
    """The names that a cell takes from others: before it gives them a value itself."""
    given: set[str] = set(vars(builtins))
    free: set[str] = set()
    inner: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_NAME" and step.argval not in given:
            free.add(step.argval)
        elif step.opname == "STORE_NAME":
            given.add(step.argval)
        elif isinstance(step.argval, CodeType):
            inner |= of_functions(step.argval)
    return free | (inner - given)


def of_functions(code: CodeType) -> set[str]:
    steps = list(dis.get_instructions(code))
    names = {s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [s.argval for s in steps if isinstance(s.argval, CodeType)]
    return names.union(*map(of_functions, inner))


CHANGED = re.compile(r"^ *(\w+)(?:\.(?:append|extend|update)\(|\[.*\] [|+]?=)", re.M)


def gives(cell: str, code: CodeType) -> set[str]:
    """The names that a cell binds, or whose lists and dictionaries it changes."""
    steps = dis.get_instructions(code)
    bound = {step.argval for step in steps if step.opname == "STORE_NAME"}
    return bound.union(CHANGED.findall(cell))


def changed(cells: list[str]) -> list[str]:
    """The cells that read a record of a GPU or what comes of it, and what they need."""
    codes = [compile(cell, "a cell", "exec") for cell in cells]
    from_cell: list[set[int]] = []
    last: dict[str, int] = {}
    for number, (cell, code) in enumerate(zip(cells, codes, strict=True)):
        from_cell.append({last[name] for name in taken(code) if name in last})
        last |= dict.fromkeys(gives(cell, code), number)
    reading: set[int] = set()
    for number, cell in enumerate(cells):
        if re.search(r"\bgpus\(", cell) or from_cell[number] & reading:
            reading.add(number)
    wanted = set(reading)
    for number in reversed(range(len(cells))):
        if number in wanted:
            wanted |= from_cell[number]
    return [cell for number, cell in enumerate(cells) if number in wanted]


def test_a_cell_is_changed_by_what_it_takes() -> None:
    cells = [
        "import json",
        "def f(x):\n    return json.loads(x)",
        "y = f('1')",
        "cards = gpus({})",
        "z = [c for c in cards]",
        "rows = []\nrows.append(z)",
        "rows = [1]\nprint(rows)",
        "print(y, f)",
        "z.append(y)",
    ]
    assert changed(cells[:-1]) == cells[3:6]
    assert changed([*cells, "print(z)"]) == [*cells[:6], "z.append(y)", "print(z)"]


# --- a page with other records


class Page:
    """What a page shows and glues with the records of a folder."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        self.glued: dict[str, Any] = {}
        for module in (gpus, plotting):
            monkeypatch.setattr(module, "display", self.show)
        monkeypatch.setattr(IPython.display, "display", self.show)
        monkeypatch.setattr(myst_nb, "glue", self.glue)
        ours = ROOT / "book" / "explorables.py"  # an extension has the same name
        spec = importlib.util.spec_from_file_location("explorables", ours)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "explorables", module)
        spec.loader.exec_module(module)
        file = next((ROOT / "book").glob(f"[0-9][0-9]_{name}.md"))
        self.notebook = jupytext.read(file)
        cells = [c for c in self.notebook.cells if c.cell_type == "code"]
        own = [c.source for c in cells if "export" not in c.metadata.get("tags", [])]
        names = dict(vars(importlib.import_module(f"diffussm.{name}")))
        names["__name__"] = "a_page"
        self.cells = changed(own)
        with mpl.rc_context():
            for cell in self.cells:
                exec(compile(cell, file.name, "exec"), names)
            mpl.pyplot.close("all")

    def show(self, *things: Any, **options: Any) -> None:
        self.shown += [getattr(thing, "data", "") for thing in things]

    def glue(self, key: str, value: Any, display: bool = True) -> None:
        self.glued[key] = value

    def text(self) -> str:
        """All that a reader sees of the records: tables, paragraphs, numbers."""
        prose = "\n".join(
            c.source for c in self.notebook.cells if "code" not in c.cell_type
        )
        numbers = re.findall(r"\{glue:text\}`([\w-]+)(?::([^`]*))?`", prose)
        here = [(key, form) for key, form in numbers if key in self.glued]
        found = [format(self.glued[key], form) for key, form in here]
        return "\n".join([*self.shown, *found])

    def lacking(self) -> set[str]:
        """The numbers that these cells glue with some records only."""
        named = re.findall(r'\bglue\("([\w-]+)"', "\n".join(self.cells))
        return set(named) - set(self.glued)


def of_today() -> dict[str, Any]:
    """Of an A100, as the command writes it now, with figures of which some failed."""
    record = json.loads(json.dumps(LATER))
    record = {k: v for k, v in record.items() if k in (*SECTIONS, "environment")}
    record["environment"]["gpu"] = "NVIDIA A100-SXM4-80GB"
    for row in record["blocks"]:
        row["passes"] = 8
        for times in row["seconds"].values():
            times[:] = [8 * time for time in times]
    record["training"][0] = {"what": "training", "error": "OutOfMemoryError: CUDA"}
    record["convolutions"][0] = {"what": "convolutions", "error": "Noise: of a job"}
    for row in record["training"]:
        row.pop("mfu", None)
    return record


NOTHING = {
    "environment": LATER["environment"],
    "kernel": [{"what": "kernel", "error": "OutOfMemoryError: CUDA out of memory"}],
}
CASES: dict[str, tuple[Any, Any]] = {
    "as they are": (FIRST, LATER),
    "exchanged": (LATER, FIRST),
    "one GPU twice": (LATER, LATER),
    "as of today": (of_today(), None),
    "nothing measured": (NOTHING, FIRST),
    "none": (None, None),
}
PAGES = (
    "profiling",
    "autotuning",
    "chunked_kernels",
    "traffic",
    "sampling_at_scale",
    "bill",
)


LIMITS = {1024: 1.5, 4096: 2, 16384: 4}  # of a block, beside fused attention


def verdict(ratio: float, limit: float, way: str) -> str:
    """As the table of limits says it: no rounding reaches a limit that was missed."""
    digits = next(n for n in range(2, 9) if round(ratio, n) != limit or ratio == limit)
    told = "reached" if ratio >= limit else "**not reached**"
    return f"{ratio:.{digits}f} ({way}), {told}"


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """The records of a case, where pages find them."""
    for file in RESULTS.glob("*.json"):
        if file.stem not in FILES:
            (tmp_path / file.name).symlink_to(file)
    records = CASES[request.param]
    for name, record in zip(FILES, records, strict=True):
        if record:
            (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(plotting, "RESULTS", tmp_path)
    return [record for record in records if record]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_goes_with_any_record(
    name: str, case: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(name, monkeypatch)
    text = page.text()
    assert page.cells and not page.lacking()
    for record in case:
        rows = [r for r in record.get("blocks", []) if FUSED.items() <= r.items()]
        gpu = record["environment"]["gpu"]
        if name == "profiling":
            assert (gpu in text) == bool(rows)
            assert all(f"{row['ratio']:.2f}" in text for row in rows)
            for row in rows:
                slow, fast = map(statistics.median, row["seconds"].values())
                limit, way = LIMITS[row["length"]], gpus.way_of(row)
                assert verdict(slow / fast, limit, way) in text
        if name == "traffic":
            for row in rows:
                once = statistics.median(row["seconds"]["DiT"]) / row.get("passes", 1)
                assert f"{1e3 * once:.1f}" in text
    if name == "profiling" and not any("training" in record for record in case):
        assert "has not been measured" in text
