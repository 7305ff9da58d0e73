"""Lint, types, and the form in which chapters are stored."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from tools.book import ROOT, chapters, labels

PAGES = sorted((ROOT / "book").glob("*.md"))
NUMBERED = [chapter.path for chapter in chapters()]


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", ".")


def test_code_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_types_hold() -> None:
    run("mypy")


@pytest.mark.slow
def test_chapters_are_stored_as_jupytext_writes_them() -> None:
    run("tools.tidy", "--check")


@pytest.fixture(scope="module")
def undefined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What ruff says about the chapters' notebooks, all in one call."""
    folder = tmp_path_factory.mktemp("notebooks")
    for path in NUMBERED:
        nbformat.write(jupytext.read(path), folder / f"{path.stem}.ipynb")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    options = ["--select=F821,F63,F7,E9", "--output-format=json", str(folder)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False
    )
    findings: dict[str, list[str]] = {path.stem: [] for path in NUMBERED}
    for found in json.loads(done.stdout):
        place = f"cell {found['cell']}, line {found['location']['row']}"
        name = Path(found["filename"]).stem
        findings[name].append(f"{place}: {found['message']}")
    return findings


@pytest.mark.parametrize("name", [path.stem for path in NUMBERED])
def test_cells_use_only_names_that_exist(
    name: str, undefined: dict[str, list[str]]
) -> None:
    assert not undefined[name]


def test_labels_are_unique_in_the_book() -> None:
    seen: dict[str, str] = {}
    for path in PAGES:
        for label in labels(path.read_text(encoding="utf-8")):
            assert label not in seen, (
                f"{label} stands in {seen[label]} and in {path.name}"
            )
            seen[label] = path.name


def test_glue_keys_are_unique_in_the_book() -> None:
    seen: dict[str, str] = {}
    for chapter in chapters():
        for cell in chapter.cells:
            for key in re.findall(r"""\bglue\(\s*["']([\w-]+)["']""", cell.source):
                assert seen.setdefault(key, chapter.name) == chapter.name, (
                    f"{key}: {seen[key]}, {chapter.name}"
                )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_fences_open(path: Path) -> None:
    """CommonMark: after ``` the line may hold no backtick, or all that follows is plain
    text.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        assert not (line.startswith("```") and "`" in line.lstrip("`")), line
