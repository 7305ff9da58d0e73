"""What helps the next person: commands that are named exist, files that others read are
well formed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

from tools import page
from tools.book import ROOT
from tools.oldest import oldest

YAMLS = [
    ".pre-commit-config.yaml",
    "CITATION.cff",
    *(p.relative_to(ROOT).as_posix() for p in (ROOT / ".github").rglob("*.yml")),
]
TEXTS = ["README.md", "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*TEXTS, *YAMLS, ".ci/run"])
def test_make_commands_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`|- run: | {4})make ([a-z]+)", text, re.MULTILINE)
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert set(named) <= targets


def test_every_target_is_phony_and_explained() -> None:
    targets = re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split()
    assert sorted(targets) == sorted(phony)
    explained = re.findall(r"^([a-z]+):.*## .+", MAKEFILE, re.MULTILINE)
    assert set(targets) - set(explained) <= {"fresh", "render", "chapters"}


@pytest.mark.parametrize("name", YAMLS)
def test_files_for_others_are_yaml_with_content(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")), dict)


def test_hooks_are_local_and_run_what_is_here() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for repository in yaml.safe_load(text)["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            module = hook["entry"].split(" -m ")[1].split()[0]
            if module.startswith("tools."):
                file = ROOT / f"{module.replace('.', '/')}.py"
                assert 'if __name__ == "__main__":' in file.read_text("utf-8"), module
            else:
                assert module in ("ruff", "mypy")


def test_workflows_run_the_same_script_and_publish_what_is_built() -> None:
    steps = {
        path.stem: path.read_text(encoding="utf-8")
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
    }
    assert "bash .ci/run" in steps["ci"]
    assert "make book" in steps["pages"] and "path: _build/html" in steps["pages"]
    assert "python -m tools.oldest" in steps["oldest"]
    assert '-m "not slow and not end_to_end"' in steps["oldest"]
    assert '-m "not slow and not end_to_end"' in MAKEFILE


@pytest.mark.slow
def test_a_test_that_never_ends_fails_and_is_named(tmp_path: Path) -> None:
    """As `make test` runs them, but for how long it waits."""
    (tmp_path / "test_fine.py").write_text("def test_fine(): pass")
    waits = "import threading\ndef test_waits(): threading.Event().wait()"
    (tmp_path / "test_waits.py").write_text(waits)
    (options,) = re.findall(r"-m pytest (-n .*loadfile.*)\)$", MAKEFILE, re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "--color=no"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
    command += [*options.split(), "-o", "faulthandler_timeout=2"]
    done = subprocess.run(
        [*command, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and "= 1 failed" in done.stdout, done.stdout
    assert "crashed while running 'test_waits.py::test_waits'" in done.stdout
    assert 'test_waits.py", line 2 in test_waits' in done.stderr


def test_oldest_versions_are_the_lower_bounds(tmp_path: Path) -> None:
    bounds = oldest()
    assert "torch==2.11" in bounds and "torchvision==0.26" in bounds
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "book"}
    assert {"data", "full", "show", "hub", "export", "demo"} <= extras.keys()
    for requirement in chain(project["dependencies"], *extras.values()):
        name, least = re.sub(r"\[.*\]", "", requirement).split(">=")
        assert bounds.count(f"{name}=={least}") == 1, requirement
    text = (ROOT / "pyproject.toml").read_text()
    for before, after, said in (
        ('"numpy>=1.26"', '"numpy"', "numpy: expected a lower bound"),
        ('"diffusers>=0.35", "g', '"diffusers>=1", "g', "diffusers: expected one"),
    ):
        assert before in text
        (tmp_path / "pyproject.toml").write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=said):
            oldest(tmp_path / "pyproject.toml")


FAKE_PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then
    [ {version} -ge 11 ] || {{ echo "Python 3.11 or newer is needed" >&2; exit 1; }}
elif [ "$2" = venv ]; then
    rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python
fi
"""


def test_venv_of_an_old_python_is_made_again_and_never_made(tmp_path: Path) -> None:
    """Interpreters that only know their version and how to copy themselves."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    for version in (10, 12):
        (tmp_path / f"python{version}").write_text(FAKE_PYTHON.format(version=version))
        (tmp_path / f"python{version}").chmod(0o755)

    def make(version: int) -> subprocess.CompletedProcess[str]:
        command = ["make", "venv", f"PYTHON=./python{version}"]
        how = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
        return subprocess.run(command, **how)

    old = make(10)
    assert old.returncode and "3.11 or newer is needed" in old.stderr
    assert not (tmp_path / ".venv" / "bin").exists()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)  # of an earlier version of us
    shutil.copy(tmp_path / "python10", tmp_path / ".venv" / "bin" / "python")
    assert make(10).returncode and not (tmp_path / ".venv" / "installed").exists()
    new = make(12)
    assert new.returncode == 0, new.stderr
    assert "-ge 11" in (made := (tmp_path / ".venv" / "bin" / "python").read_text())
    assert "[ 12" in made and (tmp_path / ".venv" / "installed").exists()


def test_version_is_said_once() -> None:
    version = re.search(
        r'__version__ = "(.+?)"', (ROOT / "diffussm" / "__init__.py").read_text()
    )
    assert version is not None
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        assert version[1] not in re.findall(
            r"version\W+([\d.]+)", (ROOT / name).read_text(encoding="utf-8")
        )


def test_a_page_is_found_by_number_name_or_path() -> None:
    for name in ("31_diffusion", "diffusion", "book/31_diffusion.md"):
        assert page.find(name) == "book/31_diffusion"
    assert page.find("notation") == "book/notation"
    with pytest.raises(ValueError, match=r"no page 'difusion'.*nearest is diffusion"):
        page.find("difusion")


@pytest.mark.end_to_end
def test_one_page_is_rendered_alone() -> None:
    command = [sys.executable, "-m", "tools.page", "notation"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    address = done.stdout.rpartition("open file://")[2].strip()
    assert "<h1>Notation" in Path(address).read_text(encoding="utf-8")
