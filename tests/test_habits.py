"""What helps the next person: commands that are named exist, files that others read are
well formed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
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
                assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
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


def test_oldest_versions_are_the_lower_bounds(tmp_path: Path) -> None:
    bounds = oldest()
    assert "torch==2.11" in bounds and "torchvision==0.26" in bounds
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(bounds) >= len(project["dependencies"])
    text = (ROOT / "pyproject.toml").read_text().replace('"numpy>=1.26"', '"numpy"')
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ValueError, match="numpy: expected a lower bound"):
        oldest(tmp_path / "pyproject.toml")


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
