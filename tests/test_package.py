"""The package as others get it: its archives, its types, its version; and the commands
that are printed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import diffussm
from diffussm import (
    autoencoder,
    bill,
    cli,
    encoding,
    evaluation,
    features,
    file_commands,
    formats,
    metrics,
    neighbours,
    options,
    plain_scores,
    pretrained,
    recipes,
    run_commands,
    run_folder,
    sample_command,
    show,
    verdict,
)
from tools.book import ROOT

sys.path.insert(0, str(ROOT / "book"))
from gpus import Gpu, way_of  # type: ignore[import-not-found]

BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, "
    "sys.argv[1])(sys.argv[2])"
)


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command as somebody would who has no checkout; what it printed."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@dataclass
class Installed:
    """An environment of its own that holds the package; all else comes from the one
    that runs the tests.
    """

    python: Path

    @classmethod
    def from_wheel(cls, wheel: Path, folder: Path) -> Installed:
        venv.create(folder, symlinks=os.name != "nt")
        names = {"base": str(folder), "platbase": str(folder)}
        packages = Path(sysconfig.get_path("purelib", "venv", names))
        (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ]
        run(*pip, "--target", packages, wheel, cwd=folder)
        return cls(
            Path(sysconfig.get_path("scripts", "venv", names))
            / Path(sys.executable).name
        )


@dataclass
class Archives:
    source: Path
    sdist: Path
    wheel: Path
    editable: Path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Built as a release is: the source archive from a checkout, the wheel from the
    source archive.
    """
    work = tmp_path_factory.mktemp("archives")
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    source = shutil.copytree(
        ROOT, work / "checkout", ignore=shutil.ignore_patterns(".git", *ignored)
    )
    run(sys.executable, "-c", BUILD, "build_sdist", work, cwd=source)
    [sdist] = work.glob("*.tar.gz")
    (work / "unpacked").mkdir()
    run("tar", "-xf", sdist, "-C", work / "unpacked", cwd=work)
    [unpacked] = (work / "unpacked").iterdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    run(*pip, "--wheel-dir", work, ".", cwd=unpacked)
    [wheel] = work.glob("*.whl")
    (work / "editable").mkdir()
    run(sys.executable, "-c", BUILD, "build_editable", work / "editable", cwd=source)
    [editable] = (work / "editable").glob("*.whl")
    return Archives(source, sdist, wheel, editable)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest,
    archives: Archives,
    tmp_path_factory: pytest.TempPathFactory,
) -> Installed:
    """`pip install` of the wheel, and README's `pip install -e .`"""
    folder = tmp_path_factory.mktemp(request.param) / "venv"
    return Installed.from_wheel(getattr(archives, request.param), folder)


# --- what is in the archives
# ------------------------------------------------------------------------------


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_source_archive_holds_the_project(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    parts = (
        *(".binder", ".ci", ".github", ".jupyter", "benchmarks"),
        *("book", "diffussm", "tests", "tools"),
    )
    project = {
        name for name in files_below(archives.source) if name.split("/")[0] in parts
    }
    project |= {
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "_config.yml",
        "_toc.yml",
        "conftest.py",
        "jupytext.toml",
    }
    assert project <= held, sorted(project - held)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(
            f"diffussm-{diffussm.__version__}.dist-info/METADATA"
        ).decode()
    assert held == {
        f"diffussm/{name}" for name in files_below(archives.source / "diffussm")
    }
    assert {
        f"diffussm/{name}"
        for name in ("py.typed", "configs/digits.yaml", "openmoji.json")
    } <= held
    weights = {name for name in held if name.startswith("diffussm/weights/")}
    assert weights == {
        f"diffussm/weights/{name}"
        for name in files_below(archives.source / "diffussm" / "weights")
    }
    assert "diffussm/weights/digits/model.safetensors" in weights
    assert (
        "\nLicense-Expression: Apache-2.0\n" in metadata
        and "\nClassifier: Typing :: Typed\n" in metadata
    )


@pytest.mark.slow
def test_version_has_one_source(installed: Installed) -> None:
    script = "from importlib.metadata import version; print(version('diffussm'))"
    assert (
        run(installed.python, "-c", script, cwd=installed.python.parent).strip()
        == diffussm.__version__
    )
    said = run(
        installed.python, "-m", "diffussm", "--version", cwd=installed.python.parent
    )
    assert said == f"diffussm {diffussm.__version__}\n"


@pytest.mark.slow
def test_weights_draw_right_after_installation(
    installed: Installed, tmp_path: Path
) -> None:
    words = "sample --pretrained digits --classes 3 --steps 3 --grid threes.png"
    python = (installed.python, "-W", "ignore", "-m", "diffussm")
    assert "wrote threes.png" in run(*python, *words.split(), cwd=tmp_path)


def test_build_leaves_nothing_that_git_shows() -> None:
    assert {"/build/", "*.egg-info/"} <= set((ROOT / ".gitignore").read_text().split())


# --- types and names
# --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_types_and_names_are_those_that_are_imported() -> None:
    tree = ast.parse(Path(diffussm.__file__).read_text(encoding="utf-8"))
    [block] = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    typed = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {
        name: (f"diffussm.{home}", name) for name, home in diffussm._HOMES.items()
    }
    assert set(diffussm.__all__) == {"__version__", *typed} <= set(dir(diffussm))
    for name, (module, _) in typed.items():
        assert getattr(diffussm, name) is getattr(import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = diffussm.nonsense


def test_renamed_names_are_refused_with_the_new_ones() -> None:
    for old, new in diffussm._RENAMED.items():
        with pytest.raises(
            ImportError, match=re.escape(f"diffussm.{old} is now {new}")
        ):
            exec(f"from diffussm import {old}")
        with pytest.raises(
            ImportError, match=re.escape(f"diffussm.{old} is now {new}")
        ):
            exec(f"import diffussm.{old}")
    with pytest.raises(ImportError, match="cannot import name 'on_chp'"):
        exec("from diffussm import on_chp")
    with pytest.raises(ModuleNotFoundError, match="No module named 'diffussm.on_chp'"):
        exec("import diffussm.on_chp")
    assert not hasattr(diffussm, "on_chp")


@pytest.mark.slow
def test_nothing_waits_for_torch() -> None:
    script = (
        "import sys, diffussm.cli; dir(diffussm); diffussm.cli.main(['--version']); "
        "assert 'torch' not in sys.modules"
    )
    run(sys.executable, "-c", script, cwd=ROOT)


USER = """\
from diffussm import DiffuSSM, DiffuSSMConfig, GaussianDiffusion, Recipe
from diffussm import evaluate, sample, train

model = DiffuSSM(DiffuSSMConfig(input_size=8, d_model=16, n_blocks=1))
diffusion = GaussianDiffusion.linear(1000)
images = sample(model, diffusion, [1, 2], steps=10)
sample(model, diffusion, [1, 2], steps="ten")  # wrong
config: int = Recipe(model=model.config)  # wrong
from diffussm import nonsense  # wrong
reveal_type(DiffuSSM)
reveal_type(GaussianDiffusion)
reveal_type(Recipe)
reveal_type(evaluate)
reveal_type(sample)
reveal_type(train)
"""
WRONG = [
    number
    for number, line in enumerate(USER.splitlines(), 1)
    if line.endswith("# wrong")
]
REVEALED = USER.count("reveal_type")

# The types of torch and its like are left out here: to read them takes mypy a minute,
# and they are not ours.
MYPY = "[mypy]\nfollow_imports = skip\n[mypy-diffussm.*]\nfollow_imports = normal\n"


@pytest.mark.slow
def test_mypy_finds_the_wrong_lines_of_a_user(
    installed: Installed, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(MYPY)
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        installed.python,
        "--config-file",
        "mypy.ini",
    ]
    said = run(*mypy, "script.py", cwd=tmp_path, code=1)
    assert [
        int(line)
        for line in re.findall(r"^script\.py:(\d+): error", said, re.MULTILINE)
    ] == WRONG, said
    revealed = re.findall(r'Revealed type is "(.*)"', said)
    assert len(revealed) == REVEALED and "Any" not in revealed, said
    assert all("diffussm." in kind for kind in revealed[:3]), said


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="needs pyright")
def test_pyright_finds_the_wrong_lines_of_a_user(
    installed: Installed, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(USER)
    pyright = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        installed.python,
        "--outputjson",
    ]
    found = json.loads(run(*pyright, "script.py", cwd=tmp_path, code=1))[
        "generalDiagnostics"
    ]
    errors = {
        one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"
    }
    assert sorted(errors) == WRONG, found
    told = [one["message"] for one in found if one["severity"] == "information"]
    assert len(told) == REVEALED and not any(
        message.endswith(('"Any"', '"Unknown"')) for message in told
    )


# --- the commands that README and chapter 14 print
# --------------------------------------------------------

STUB = """\
#!{python}
import json, sys
with open({record!r}, "a") as file:
    print(json.dumps([{name!r}, *sys.argv[1:]]), file=file)
"""
PROGRAMS = (
    "diffussm",
    "torchrun",
    "make",
    "pip",
    "hf",
    "wget",
    "sha256sum",
    "benchmarks/gpu.sh",
)


def blocks(page: Path) -> list[str]:
    """The commands of a page, by blocks: fenced, or indented below an empty line."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?<=\n\n)(?: {4}.*\n)+", outside)


def carried_out(block: str, folder: Path) -> list[list[str]]:
    """Let bash read a block, with programs that only note how they were called."""
    record = folder / "called"
    record.unlink(missing_ok=True)
    for name in PROGRAMS:
        program = folder / "bin" / name if "/" not in name else folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(
            STUB.format(python=sys.executable, record=str(record), name=name)
        )
        program.chmod(0o755)
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder)}
    command = [shutil.which("bash"), "-euc", block]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, block + done.stderr
    return (
        [json.loads(line) for line in record.read_text().splitlines()]
        if record.exists()
        else []
    )


class Reached(Exception):
    """A command has read its options, and would begin its work."""


def reach(*arguments: object, **options: object) -> NoReturn:
    raise Reached


OWN_VAE = "autoencoder"  # what the page of one's own images makes, and where


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command stops where its options are read; runs have the recipe that their
    name says.
    """

    def load_run(
        run: Path, weights: str, step: int | None
    ) -> tuple[object, options.Recipe, list[str]]:
        name = {"xl": "imagenet256", "xl512": "imagenet512"}.get(run.name, run.name)
        recipe, _ = recipes.read_recipe(name)
        return (
            SimpleNamespace(to=reach),
            recipe,
            [f"class {i}" for i in range(recipe.model.num_classes)],
        )

    def load_vae(name: str, device: object) -> NoReturn:
        on_the_hub = re.fullmatch(r"[\w-]+/[\w-]+", name)
        known = on_the_hub or name.startswith(f"{tmp_path}/models/")
        assert known or name == OWN_VAE, f"{name} is neither on the hub nor a folder"
        raise Reached

    monkeypatch.chdir(tmp_path)
    for folder in ("data", "models", "runs"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(run_folder, "load_run", load_run)
    known = SimpleNamespace(data={"images": 1})
    monkeypatch.setattr(run_folder, "read_run", lambda run: known)
    monkeypatch.setattr(pretrained, "load_pretrained", reach)
    monkeypatch.setattr(formats, "images_from", lambda *given, **options: [])
    monkeypatch.setattr(autoencoder, "load_vae", load_vae)
    monkeypatch.setattr(autoencoder, "train_vae", reach)
    monkeypatch.setattr(encoding, "encode", reach)
    monkeypatch.setattr(recipes, "open_data", lambda *given: [])
    monkeypatch.setattr(recipes, "inferred", lambda *given: {})
    monkeypatch.setattr(recipes, "fit", lambda recipe, *given: recipe)
    monkeypatch.setattr(run_commands, "_decoder_of", reach)

    def start(*given: object, **options: object) -> nullcontext[str]:
        return nullcontext("cpu")

    for module in (file_commands, run_commands, sample_command):
        monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(verdict, "examine", reach)
    monkeypatch.setattr(evaluation, "evaluate", reach)
    monkeypatch.setattr(features, "save_statistics", reach)
    monkeypatch.setattr(metrics, "self_test", reach)
    monkeypatch.setattr(plain_scores, "plain_scores", reach)
    monkeypatch.setattr(neighbours, "find_copies", reach)
    monkeypatch.setattr(show, "read_history", reach)


def check(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A printed command is understood: by our own parsers, by the Makefile, by
    torchrun.
    """
    name, *arguments = command
    if name == "make":
        targets = re.findall(
            r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
        assert {word for word in arguments if "=" not in word} <= set(targets), command
    elif name == "torchrun":
        place = arguments.index("-m")
        assert arguments[place + 1] == "diffussm"
        check(arguments[place + 1 :], capsys)
    elif name == "diffussm":
        try:
            code = cli.main(arguments)
        except Reached:
            return
        said = capsys.readouterr()
        assert code == 0 and "--help" in arguments, f"{' '.join(command)}\n{said.err}"
    else:
        assert "/" not in name or (ROOT / name).is_file(), command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("README.md", {"encode", "doctor", "train", "sample", "evaluate"}),
        ("book/99_imagenet.md", {"encode", "doctor", "train", "sample", "evaluate"}),
        ("book/99_own_images.md", {"vae", "encode", "train", "sample"}),
    ],
)
def test_printed_commands_are_understood(
    page: str,
    expected: set[str],
    no_work: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = []
    for block in blocks(ROOT / page):
        for place in ("/data", "/models", "/runs"):
            block = re.sub(rf"(?<![\w.]){place}/", f"{tmp_path}{place}/", block)
        commands += carried_out(block, tmp_path)
    used = {word for command in commands for word in command if word in cli.COMMANDS}
    assert used >= expected, "the page was not read"
    for command in commands:
        check(command, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "diffussm train digits --out runs/x --stepz 3",
        "diffussm train digit --out runs/x",
        "diffussm train digits --out runs/x --steps many",
        "diffussm sample --from runs/xl --vae vae --preset paper --out xl.npz",
        "diffussm sample --from runs/digits --classes 11 --grid x.png",
        "torchrun -m diffussm encode images latents --vae vae",
        "diffussm encode images latents --vae sd-vae-ft-ema --size 256",
        "diffussm evaluate --self-test --reference x.npz",
        "diffussm draw",
        "make coffee",
    ],
)
def test_printed_commands_with_a_fault_are_seen(
    command: str, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        check(command.split(), capsys)


def test_printed_programs_must_exist(tmp_path: Path) -> None:
    assert carried_out("make a && make b  # why\n", tmp_path) == [
        ["make", "a"],
        ["make", "b"],
    ]
    with pytest.raises(AssertionError, match="not found"):
        carried_out("dissufm train", tmp_path)


# --- what README says of measurements and files
# -----------------------------------------------------------


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_records_older_than_their_code_are_named_with_their_dates() -> None:
    """Whoever measures again takes the row out of the table."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    old = dict(re.findall(r"^\| `(\w+)` \| ([\d-]{10}) \|", text, re.MULTILINE))
    assert old == {name: results(name)["environment"]["date"] for name in old}
    measured = [row["what"] for row in results("train_step")["rows"]]
    lacks = not any(what.startswith("W0 and W1") for what in measured)
    assert ("train_step" in old and "*W0 and W1" in text) == lacks
    assert "gpu" in old


def test_readme_says_what_was_measured() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        "a block is faster than a DiT block of its width at every length measured"
        in text
    )
    whole = {row["length"]: row["ratio"] for row in reversed(results("block")["rows"])}
    ratios = [whole[length] for length in sorted(whole)]  # at the larger batches
    assert ratios[0] > 1 and ratios == sorted(ratios)
    for name in ("gpu", "gpu_h200"):
        sentence = on_a_gpu(results(name))
        assert sentence in text, f"README does not say of {name}.json: {sentence}"
    said = re.findall(r"On one (\w+) with the", text)
    named = [results(name)["environment"]["gpu"] for name in ("gpu", "gpu_h200")]
    assert all(any(gpu in name for name in named) for gpu in said), "no record is of it"


def on_a_gpu(record: dict) -> str:
    """What README says of a GPU, by its record; nothing where that lacks a figure."""
    gpu = Gpu("", "", record)
    card = re.search(r"\w*\d\w*", record["environment"]["gpu"])
    best: dict[str, Any] = {}
    for kind in ("DiT", "DiffuSSM"):
        speed = "images_per_second"
        rows = gpu.rows("training", speed, kind=kind, length=1024)
        best[kind] = max(rows, key=lambda row: row[speed], default=None)
    ratios = [
        row["ratio"]
        for row in gpu.rows("blocks", "ratio", attention="fused attention")
        if best["DiffuSSM"] and way_of(row) == way_of(best["DiffuSSM"])
    ]
    if not (card and all(best.values()) and ratios):
        return ""
    faster = best["DiffuSSM"][speed] > best["DiT"][speed]
    told = "faster" if faster else "slower"
    ahead = sum(ratio > 1 for ratio in ratios)
    return (
        f"On one {card[0]} with the {way_of(best['DiffuSSM'])}, DiffuSSM-XL trains "
        f"{told} at L = 1024 than DiT with fused attention, "
        f"and a block is faster at {ahead} of the {len(ratios)} lengths measured."
    )


@pytest.mark.parametrize("name", ["gpu", "gpu_h200"])
def test_readme_would_say_the_opposite_of_the_opposite_record(name: str) -> None:
    record = results(name)
    sentence = on_a_gpu(record)
    for row in record["training"]:
        if "images_per_second" in row:
            row["images_per_second"] = 1 / row["images_per_second"]
    for row in record["blocks"]:
        if "ratio" in row:
            row["ratio"] = 1 / row["ratio"]
    changed = on_a_gpu(record)
    assert sentence and changed and ("slower" in sentence) == ("faster at L" in changed)
    assert on_a_gpu({"environment": record["environment"]}) == ""


def test_readme_lists_what_chapter_14_lists() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    known = {one.name: (one.size, one.sha256) for one in bill.DOWNLOADS}
    assert len(rows) == 3
    for name, size, sha256 in rows:
        assert known[name] == (int(size.replace(",", "")), sha256)


def test_readme_figure_is_of_the_weights_that_come_with_it() -> None:
    record = json.loads(
        (ROOT / "diffussm" / "weights" / "digits" / "record.json").read_text()
    )
    assert (
        f"after {record['steps']:,} training steps" in (ROOT / "README.md").read_text()
    )
    assert recipes.read_recipe("digits")[0].steps == record["steps"]


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        diffussm.DiffuSSM, "from_preset", lambda name, **given: small_model(name, given)
    )
    snippets = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert len(snippets) == 2
    for snippet in snippets:
        exec(
            compile(
                snippet.replace("steps=250", "steps=2").replace("steps=50", "steps=2"),
                "README.md",
                "exec",
            ),
            {},
        )


def small_model(name: str, given: dict) -> diffussm.DiffuSSM:
    """Stands for XL, which is too large for a test; its name and options must be right
    all the same.
    """
    assert name in diffussm.PRESETS
    small = {"d_model": 16, "n_blocks": 1, "d_state": 4}
    return diffussm.DiffuSSM(diffussm.DiffuSSMConfig(**given | small))
