"""The command line: exit codes, sentences, and a thousand pieces of nonsense."""

import contextlib
import io
import logging
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
from commands import SMALL, diffussm, listing, shell

from diffussm import cli

MISTAKES = [
    ("dream", "no command 'dream'"),
    (
        "sample --from {w}/digits --classes eleven --grid {t}/x.png",
        "'eleven' is no class",
    ),
    ("sample --from {w}/digits --classes 10 --grid {t}/x.png", "'10' is no class"),
    ("sample --from {t}/nowhere --grid {t}/x.png", "not a training run"),
    ("sample --from {w}/digits --grid {t}/x.jpg", "ends in .png"),
    (
        "sample --from {w}/digits --grid {t}/no/such/folder/x.png",
        "expected a folder for x.png",
    ),
    ("sample --from {w}/digits --grid {t}/x.png --per_class 0", "per_class"),
    ("sample --from {w}/digits --grid {t}/x.png --steps 0", "steps"),
    ("sample --from {w}/digits --grid {t}/x.png --steps many", "steps"),
    ("sample --from {w}/digits --grid {t}/x.png --method euler", "ddim"),
    ("sample --from {w}/digits --grid {t}/x.png --preset ugly", "pretty"),
    ("sample --from {w}/digits --grid {t}/x.png --vae {w}/vae", "pixels"),
    ("sample --from {w}/digits --grid {t}/x.png --out {t}/y", "either"),
    ("sample --from {w}/digits --grid {t}/x.png --device quantum", "quantum"),
    ("sample --from {w}/digits", "either"),
    ("sample --from {w}/digits --gif {t}/x.gif --out {t}/y", "either"),
    ("sample --from {w}/digits --gif {t}/x.png", "ends in .gif"),
    ("sample --from {w}/digits --out {t}/y --cfg_scale 1,2", "a set has one"),
    ("sample --from {w}/digits --grid {t}/x.png --cfg_scale 1,much", "1,2,4"),
    ("sample --from {w}/digits --grid {t}/x.png --cfg_scale 1,-2", "at least 0"),
    ("sample --from {w}/digits --grid {t}/x.png --seeds 0,1.5", "1,2,4"),
    ("sample --from {w}/digits --grid {t}/x.png --seeds 0 --interpolate 1,2", "both"),
    ("sample --from {w}/digits --grid {t}/x.png --interpolate 3", "two seeds"),
    ("sample --from {w}/digits --grid {t}/x.png --interpolate 3,3", "two seeds"),
    (
        "sample --from {w}/digits --grid {t}/x.png --interpolate 3,4 --per_class 1",
        "2 or more",
    ),
    (
        "sample --from {w}/digits --grid {t}/x.png --interpolate 3,4 --method ddpm",
        "needs ddim",
    ),
    (
        "sample --from {w}/digits --grid {t}/x.png --interpolate 3,4 --scheduler DDPM",
        "draws noise",
    ),
    (
        "sample --from {w}/digits --grid {t}/x.png --scheduler Euler",
        "EulerDiscreteScheduler",
    ),
    (
        "sample --from {w}/digits --gif {t}/x.gif --steps 5 --scheduler "
        "DPMSolverSinglestep",
        "at least 64",
    ),
    ("sample --from {w}/latent-run --grid {t}/x.png", "--vae"),
    (
        "sample --from {w}/latent-run --out {t}/y --vae {w}/other",
        "made by the encoder of",
    ),
    ("sample --from {w}/latent-run --out {t}/y --vae {t}/nowhere", "nowhere"),
    ("sample --from {w}/digits --out {w}/images --count 3", "no set of samples"),
    ("sample --grid {t}/x.png", "from"),
    ("train", "name what to train"),
    ("train --out {t}/new digits", "name what to train"),
    ("train digits --out {t}/new --lr 2", "learning rate"),
    ("train digits --out {t}/new --model.d_state 3", "3"),
    ("train digits --out {t}/new --model.d_mode 3", "d_mode"),
    ("train digits --out {t}/new --model.downsample 3", "3"),
    ("train digits --out {t}/new --stepz 3", "stepz"),
    ("train digits --out {t}/new --data {t}/nowhere", "nowhere"),
    ("train digits --out {t}/new --data {w}/images", "the model takes"),
    ("train digits --out {t}/new --micro_batch 5", "micro_batch"),
    ("train digits --out {t}/new --batch_size 100000", "batch_size"),
    ("train cats --out {t}/new", "digits"),
    ("train {w}/images --out {t}/new", "no recipe"),
    ("train {w}/vae/config.json --out {t}/new", "config.json"),
    ("train digits", "out"),
    ("train digits --out {t}/new --convolution fast", "convolution"),
    ("train digits --out {t}/new --keep soon", "keep"),
    ("sample --from {w}/digits --grid {t}/x.png --step 3", "step 3"),
    ("evaluate {w}/images --self_test", "alone"),
    ("statistics {w}/images {t}/x.npz --size 0", "--size 0: expected an integer"),
    ("encode {w}/images {t}/new --vae {w}/vae --size 16 --workers 0", "at least 1"),
    ("train digits --out {w}/digits --lr 0.5", "holds another run"),
    ("train digits --out {w}/images", "holds no training run"),
    ("train imagenet256 --out {t}/new", "--data"),
    ("train imagenet256 --out {t}/new --data {w}/images", "diffussm encode"),
    ("train imagenet256 --out {t}/new --data {w}/latents", "the model takes"),
    ("train {w}/tiny.yaml --out {t}/new --data {w}/latents --sample_every 2", "--vae"),
    (
        "train {w}/tiny.yaml --out {t}/new --data {w}/latents --vae {w}/other",
        "made by the encoder of",
    ),
    (
        "train {w}/tiny.yaml --out {t}/new --data {w}/latents --model.num_classes 3",
        "classes",
    ),
    ("encode {w}/images {w}/latents --vae {w}/vae --size 8", "other latents"),
    (
        "encode {w}/images {w}/latents --vae {w}/other --size 16 --shard_size 8",
        "other latents",
    ),
    ("encode {w}/images {w}/vae --vae {w}/vae --size 16", "holds no latents"),
    ("encode {w}/images {t}/new --vae {w}/vae --size 15", "multiples of 4"),
    ("encode {w}/images {t}/new --vae {w}/vae --size 0", "at least 1"),
    ("encode {w}/images {t}/new --vae {w}/images --size 16", "config.json"),
    ("encode {w}/images {t}/new --vae {t}/nowhere --size 16", "nowhere"),
    ("encode {t}/nowhere {t}/new --vae {w}/vae --size 16", "nowhere"),
    ("encode {w}/latents {t}/new --vae {w}/vae --size 16", "no images"),
    ("encode {w}/images {t}/new --size 16", "vae"),
    ("vae {w}/images {w}/vae --size 16", "exists"),
    ("vae {w}/images {w}/tiny.yaml --size 16", "exists"),
    ("vae {w}/images {t}/new --size 15 --steps 1", "multiple of"),
    ("vae {w}/images {t}/new --size 16 --steps 0", "at least 1"),
    ("vae {t}/nowhere {t}/new", "nowhere"),
    ("evaluate {w}/images", "--reference"),
    ("evaluate {w}/images --reference {w}/images --out {w}/tiny.yaml", ".json"),
    (
        "evaluate {w}/images --reference {w}/images --out {w}/digits/config.json",
        "exists",
    ),
    (
        "evaluate {w}/images --reference {w}/images --out {t}/no/x.json",
        "expected a folder for x.json",
    ),
    ("statistics {w}/images {t}/x.csv", ".npz"),
    ("statistics {w}/images {t}/x.npz --device quantum", "quantum"),
    ("evaluate {w}/images --reference {w}/images --device cuda", "no GPU"),
    ("statistics {w}/images {t}/no/x.npz", "expected a folder for x.npz"),
    ("evaluate {w}/images --reference {w}/images", "--weights"),
    (
        "evaluate {w}/images --reference {w}/images --weights {t}/none --out "
        "{t}/x.json",
        "there is no ",
    ),
    (
        "evaluate {w}/images --reference {w}/images --weights {w}/tiny.yaml --out "
        "{t}/x.json",
        "tiny.yaml",
    ),
    ("statistics {w}/images {t}/x.npz", "--weights"),
    ("doctor cats", "no recipe"),
    ("doctor digits --limit 0", "--limit"),
    ("doctor", "recipe"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_gets_a_sentence_and_writes_nothing(
    work, tmp_path, monkeypatch, command, said
):
    before = listing(work)
    monkeypatch.chdir(tmp_path)
    assert said in diffussm(command, (1, 2), w=work, t=tmp_path)
    assert not list(tmp_path.iterdir()) and listing(work) == before


def test_the_shell_sees_the_same_sentence_and_exit_code(tmp_path):
    done = shell("train", "digits", "--out", "new", "--model.d_mode", "3", cwd=tmp_path)
    assert done.returncode in (1, 2) and "d_mode" in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_bug_still_shows_its_traceback(monkeypatch):
    def broken():
        """broken"""
        raise TypeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "vae", broken)
    with pytest.raises(TypeError):
        cli.main(["vae"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("no room"), 1, "no room"),
        (FloatingPointError("diverged"), 1, "diverged"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--micro_batch"),
    ],
)
def test_exit_codes_are_those_of_the_table(monkeypatch, error, code, said):
    def stopped():
        """stopped"""
        raise error

    monkeypatch.setitem(cli.COMMANDS, "vae", stopped)
    assert said in diffussm("vae", code)


def test_a_later_process_says_which_it_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert "[process 3]" in diffussm("train", 1)


def test_help_lists_the_commands_and_does_not_wait_for_torch():
    said = diffussm("--help")
    for name in (
        "vae",
        "encode",
        "doctor",
        "train",
        "show",
        "sample",
        "evaluate",
        "statistics",
        "neighbours",
        "bound",
    ):
        assert name in said


WITHOUT_TORCH = """
import contextlib, io, sys
from diffussm.cli import main

class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch was wanted")

sys.meta_path.insert(0, NoTorch())
for words, code, told in {commands}:
    both = io.StringIO()
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        assert main(words.split()) == code, words
    said = both.getvalue()
    wanted = "tensorboard" in words
    assert told in said and ("torch was wanted" in said) == wanted, (words, said)
"""


def test_help_and_mistakes_do_without_torch_and_train_speaks_before_it(tmp_path):
    commands = [
        ("--help", 0, "statistics"),
        ("version", 0, "diffussm 0"),
        ("trian digits", 2, "did you mean 'train'"),
        ("train --help", 0, "--batch_size"),
        ("help doctor", 0, "--limit"),
        *((f"{name} --help", 0, "usage: ") for name in cli.COMMANDS),
        ("sample --from x --grid x.png --stepz 3", 2, "--steps"),
        ("sample --from x --grid x.png --preset ugly", 2, "pretty"),
        ("sample --from x --out y --count 0", 1, "count=0"),
        ("sample --grid x.png", 1, "give either --from RUN or --pretrained"),
        ("sample --from x", 1, "give either --grid"),
        ("train digits --out x --stepz 3", 2, "--steps"),
        ("train digits --out x --lr fast", 2, "a number"),
        ("encode a b --vae c", 2, "--size"),
        ("train digits --out x --tensorboard", 1, "1,500 steps on digits, in x\n"),
    ]
    code = WITHOUT_TORCH.format(commands=commands)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_pulls_in_no_heavy_library():
    heavy = (
        "diffusers",
        "sklearn",
        "matplotlib",
        "torchvision",
        "torch_fidelity",
        "tensorboard",
        "lmdb",
    )
    code = (
        "import sys, torch, diffussm, diffussm.cli; from diffussm import DiffuSSM, "
        "sample, train; "
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def interrupting(*_, **__):
    raise KeyboardInterrupt


INTERRUPTED = [
    (
        "diffussm.autoencoder.train_vae",
        "vae {w}/images {t}/new --size 16",
        "nothing is kept",
    ),
    (
        "diffussm.autoencoder.load_vae",
        "encode {w}/images {w}/latents --vae {w}/vae --size 16",
        "2 finished shards",
    ),
    (
        "diffussm.pictures.draw_grid",
        "sample --from {w}/digits --grid {t}/x.png --device cpu",
        "nothing is kept",
    ),
    (
        "diffussm.runs.train",
        "train digits --out {w}/digits --steps 4 " + SMALL,
        "goes on from step 4",
    ),
    ("diffussm.runs.train", "train digits --out {t}/new " + SMALL, "begins again"),
    (
        "diffussm.evaluation.evaluate",
        "evaluate {w}/images --reference {w}/images",
        "nothing is kept",
    ),
    (
        "diffussm.features.save_statistics",
        "statistics {w}/images {t}/x.npz",
        "nothing is kept",
    ),
    (
        "diffussm.samples.draw_samples",
        "sample --from {w}/digits --out {t}/new --count 2 --device cpu",
        "finished batches are kept",
    ),
]


@pytest.mark.parametrize(
    ("where", "command", "said"), INTERRUPTED, ids=range(len(INTERRUPTED))
)
def test_an_interrupted_command_says_what_is_kept(
    work, tmp_path, monkeypatch, where, command, said
):
    monkeypatch.setattr(where, interrupting)
    assert said in diffussm(command, 130, w=work, t=tmp_path)


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def fileno(self):
        return self.file.fileno()

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_leaves_ends_the_output_and_not_the_command(tmp_path):
    with (
        (tmp_path / "stream").open("w") as file,
        contextlib.redirect_stdout(Gone(file)),
    ):
        assert cli.main(["evaluate", "--self_test"]) == 0
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == os.devnull


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_a_strict_stream_cannot_encode_are_escaped(monkeypatch, encoding):
    def named():
        """named"""
        print("caf\u00e9 \u4e2d \udcff.png")
        print("caf\u00e9 \u4e2d \udcff.png", file=sys.stderr)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "vae", named)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
    out, err = streams
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.main(["vae"]) == 0
    said = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    whole = "caf\u00e9 \u4e2d \udcff.png\n".encode(encoding, "backslashreplace")
    assert said == [whole.decode(encoding)] * 2
    assert "\\udcff.png" in said[0]


class Terminal(io.StringIO):
    """A terminal, and what stands on it in the end."""

    def isatty(self):
        return True

    def lines(self):
        shown, column = [""], 0
        for sign in self.getvalue():
            if sign == "\n":
                shown, column = [*shown, ""], 0
            elif sign == "\r":
                column = 0
            else:
                shown[-1] = shown[-1][:column] + sign + shown[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in shown]


def busy():
    """busy"""
    from tqdm import tqdm

    with tqdm(total=3, mininterval=0, desc="bar") as bar:
        bar.update()
        logging.getLogger("diffussm.folders").warning("a log")
        print("a print")
        print("in", "two", "parts", file=sys.stderr)
        bar.update()
        # as Python shows one; pytest keeps those that are raised here
        sys.stderr.write(warnings.formatwarning("a warning", UserWarning, "x.py", 1))
        print("at the end", end="")
    return 0


def test_what_is_said_under_a_bar_stands_above_it(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "vae", busy)
    screen = Terminal()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        assert cli.main(["vae"]) == 0
    lines = screen.lines()
    assert lines[:3] == ["a log", "a print", "in two parts"]
    assert any(line.endswith("UserWarning: a warning") for line in lines)
    (bar,) = [i for i, line in enumerate(lines) if "bar" in line and "2/3" in line]
    assert lines[bar + 1 :] == ["at the end"]


def test_a_bar_that_nobody_watches_is_a_line_in_thirty_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    screen = io.StringIO()
    stream = cli._Stream(screen)
    for now[0] in (0.0, 29.0, 30.0, 59.0, 61.0):
        stream.write(f"\rat {now[0]:.0f}")
        stream.write("")
    stream.write("\n")  # the bar ends
    print("a line", file=stream)
    print(file=stream)
    assert screen.getvalue() == "at 30\nat 61\na line\n\n"
    monkeypatch.setitem(cli.COMMANDS, "vae", busy)
    said = diffussm("vae")  # which knows that no bar is drawn
    assert "a print\n" in said and "bar" not in said.replace("bar.", "")


@pytest.mark.slow
def test_without_signals_and_locks_of_unix_the_commands_work(tmp_path):
    """As on Windows: no SIGUSR1, no fcntl; simulated here."""
    commands = [
        f"train digits --out {tmp_path}/run --steps 2 --no_grid {SMALL}",
        f"sample --from {tmp_path}/run --grid {tmp_path}/x.png --steps 2 --classes 1 "
        "--device cpu",
        f"sample --from {tmp_path}/run --out {tmp_path}/x.npz --steps 2 --count 2 "
        "--device cpu",
        "doctor digits --quick --device cpu --processes 1",
    ]
    program = (
        "import signal, sys; del signal.SIGUSR1; sys.modules['fcntl'] = None\n"
        "from diffussm.cli import main\n"
        f"sys.exit(max(main(words.split()) for words in {commands!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "x.png").is_file() and "Traceback" not in done.stderr


def test_100_fuzzed_command_lines_are_refused_without_a_file(
    work, tmp_path, monkeypatch
):
    rng = random.Random(3)
    monkeypatch.chdir(tmp_path)
    before = listing(work)
    options = (
        "--out --from --grid --vae --size --steps --count --device --weights --limit "
        "--lr --config"
    ).split()
    values = [
        "",
        "-1",
        "0",
        "x",
        "nan",
        "../nowhere",
        "1e999",
        "[]",
        "{",
        "null",
        "--",
        "\u2028",
    ]
    for _ in range(100):
        name = rng.choice(
            ["vae", "encode", "doctor", "train", "sample", "statistics", "dream"]
        )
        words = [name, *rng.choices(values, k=rng.randrange(3))]
        for _ in range(rng.randrange(4)):
            words += [rng.choice(options), rng.choice(values)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert cli.main(words) in (1, 2), words
        assert "Traceback" not in err.getvalue() and err.getvalue().strip()
        assert not list(tmp_path.iterdir()), words
    assert listing(work) == before
