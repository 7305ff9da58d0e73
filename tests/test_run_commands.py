"""The command train: what it leaves, says, and goes on with."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ALONE, SMALL, diffussm, listing
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffussm import progress, recipes, run_commands
from diffussm.data import TensorData, batch_indices, digits
from diffussm.latents import LatentStore


def test_train_leaves_a_log_checkpoints_and_a_picture(work):
    run = work / "digits"
    assert [
        json.loads(line)["step"]
        for line in (run / "log.jsonl").read_text().splitlines()
    ] == [4]
    assert (
        run / "checkpoints" / "step_00000004" / "ema" / "model.safetensors"
    ).is_file()
    height, width = np.asarray(Image.open(run / "samples.png")).shape
    assert height == 10 * 52 and 8 * 52 < width < 9 * 52  # digits stand beside the rows


def test_training_on_latents_draws_decoded_pictures_and_remembers_the_autoencoder(work):
    run = work / "latent-run"
    for picture in (run / "samples.png", run / "samples" / "step_00000004.png"):
        height, width, _ = np.asarray(Image.open(picture)).shape  # 16 pixels, tripled
        assert height == 2 * 52 and width > 8 * 52 + 24  # cats and dogs beside them
    assert (
        json.loads((run / "vae.json").read_text()) == LatentStore(work / "latents").vae
    )
    assert list((run / "tensorboard").glob("events.*"))
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [one.step for one in board.Images("samples")] == [4, 4]
    height, width, _ = np.asarray(Image.open(run / "samples.png")).shape
    shown = board.Images("samples")[-1]
    assert (shown.height, shown.width) == (height, width)
    assert [one.step for one in board.Scalars("loss")] == [2, 4]


def test_training_says_how_large_how_fast_and_how_long(tmp_path):
    said = diffussm(f"train digits --out {tmp_path}/run --steps 4 --no_grid {SMALL}")
    for words in (
        "10,084 parameters, ",
        "dynamics",
        "images/s",
        " s left",
        "4 steps done",
    ):
        assert words in said


@pytest.mark.slow
def test_a_step_that_was_left_out_is_said_and_reaches_the_board_as_numbers(
    tmp_path, monkeypatch
):
    class TooLarge(TensorData):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (
                image + 1e30
                if index == int(batch_indices(len(self), 8, 1, 0)[0])
                else image
            ), label

    seen = []
    board = SimpleNamespace(
        add_scalar=lambda name, value, step: seen.append(float(value)),
        close=lambda: None,
    )
    monkeypatch.setattr(run_commands, "board_writer", lambda: lambda *_, **__: board)
    monkeypatch.setattr(recipes, "open_data", lambda *given: TooLarge(*digits("train")))
    said = diffussm(
        f"train digits --out {tmp_path}/run --steps 3 --no_grid --tensorboard "
        f"{SMALL} --log_every 1"
    )
    assert "step 2 of 3: loss not finite" in said and len(seen) > 20


def test_the_same_command_resumes(work, tmp_path):
    out = tmp_path / "run"
    diffussm(f"train digits --out {out} --steps 4 --no_grid {SMALL}")
    diffussm(f"train digits --out {out} --steps 8 --no_grid {SMALL}")
    assert [
        json.loads(line)["step"]
        for line in (out / "log.jsonl").read_text().splitlines()
    ] == [4, 8]


def test_options_come_from_a_yaml_file_and_are_overruled_by_words(work, tmp_path):
    words = (
        "train {w}/tiny.yaml --data {w}/latents --out {t}/run --batch_size 2 "
        "--device cpu --no_grid"
    )
    diffussm(words, w=work, t=tmp_path)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (stored["steps"], stored["model"]["d_model"], stored["batch_size"]) == (
        4,
        16,
        2,
    )
    (tmp_path / "part.yaml").write_text("steps: 2\nmodel:\n  d_model: 8\n")
    diffussm(
        words.replace("run", "run2") + " --config {t}/part.yaml", w=work, t=tmp_path
    )
    stored = json.loads((tmp_path / "run2" / "config.json").read_text())["recipe"]
    assert (
        stored["steps"],
        stored["model"]["d_model"],
        stored["model"]["num_classes"],
    ) == (2, 8, 2)


def test_training_takes_an_image_folder_without_classes(work, tmp_path):
    (tmp_path / "pixels.yaml").write_text(
        "model: "
        "{input_size: 8, in_channels: 3, num_classes: 0, "
        "d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 2\nbatch_size: 4\n"
    )
    words = "train {t}/pixels.yaml --data {w}/images --out {t}/run --device cpu"
    diffussm(words, w=work, t=tmp_path)
    assert np.asarray(Image.open(tmp_path / "run" / "samples.png")).shape == (
        52,
        8 * 52,
        3,
    )


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_the_same_command_goes_on(tmp_path, monkeypatch):
    def once_shown(line):
        if line.startswith("step 1 "):  # the first row is told, whatever the clock says
            os.kill(os.getpid(), signal.SIGINT)

    words = (
        f"train digits --out {tmp_path}/run --steps 6 --no_grid {SMALL} --log_every 1"
    )
    with monkeypatch.context() as patch:
        patch.setattr(progress, "say", once_shown)
        said = diffussm(words, 75)
    step = json.loads(
        (tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json").read_text()
    )["step"]
    assert step == 2 and "goes on from there" in said and "step 2 of 6" in said
    assert (tmp_path / "run" / "preempted").read_text().strip() in said
    assert "6 steps done" in diffussm(words)


@pytest.mark.slow
def test_training_goes_on_when_its_reader_leaves_and_writes_few_lines(tmp_path):
    command = [
        sys.executable,
        "-m",
        "diffussm",
        *f"train digits --out {tmp_path}/run --steps 30 {SMALL}".split(),
    ]
    job = subprocess.Popen(
        [*command, "--no_grid"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    job.stdout.close()
    with job.stderr as stream:
        said = stream.read().decode()
    assert job.wait(timeout=400) == 0, said
    assert (tmp_path / "run" / "checkpoints" / "step_00000030").is_dir()
    assert "Traceback" not in said and "Broken pipe" not in said
    assert "step/s" not in said  # nobody watches a bar


@pytest.mark.slow
def test_a_line_of_output_does_not_stick_to_the_bar():
    from tqdm import tqdm

    stream = io.StringIO()
    with (
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        tqdm(total=3) as bar,
    ):
        bar.update()
        progress.say("a line")
    assert ALONE.search(stream.getvalue())[1] == "a line"


def test_a_run_goes_on_with_other_pictures_only_when_told(plain, tmp_path):
    shutil.copytree(plain.run, tmp_path / "run")
    shutil.copytree(plain.folder / "images", tmp_path / "images")
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / "7.png")
    words = (
        "train {f}/plain.yaml --data {t}/images --out {t}/run --device cpu --steps 4 "
        "--no_grid --keep_last 1"
    )
    assert "--other_data" in diffussm(words, 1, f=plain.folder, t=tmp_path)
    assert "4 steps done" in diffussm(
        words + " --other_data", f=plain.folder, t=tmp_path
    )


def test_the_weights_are_where_the_last_line_says(plain):
    assert f"{plain.run}/checkpoints/step_00000003/ema" in plain.said
    assert (
        plain.run / "checkpoints" / "step_00000003" / "ema" / "model.safetensors"
    ).is_file()


def test_kept_checkpoints_are_named_without_brackets(plain):
    assert json.loads((plain.run / "config.json").read_text())["execution"]["keep"] == [
        "1",
        "2",
    ]


NARROW = (
    "--model.d_model 16 --model.n_blocks 1 --model.d_state 4 --device cpu --no_grid"
)


def test_own_pixels_and_latents_train_with_no_further_option_and_go_on(work, tmp_path):
    """Their channels, size, classes and batch are the data's, and stand in the run."""
    for name, data, shape in (
        ("pixels", "images", (3, 32, 2)),
        ("latents", "latents", (4, 4, 2)),
    ):
        words = f"train {name} --data {{w}}/{data} --out {{t}}/{name} --steps 2"
        said = diffussm(f"{words} {NARROW}", w=work, t=tmp_path)
        assert said.count("--model.num_classes 2 --batch_size 12") == 1, said
        assert f"2 steps are few for {name}: --warmup 0" in said
        stored = json.loads((tmp_path / name / "config.json").read_text())["recipe"]
        model = stored["model"]
        found = (model["in_channels"], model["input_size"], model["num_classes"])
        assert found == shape
        assert stored["batch_size"] == 12
        assert "2 steps done" in diffussm(f"{words} {NARROW}", w=work, t=tmp_path)


def test_a_short_run_is_prolonged_with_the_warmup_that_it_had(work, tmp_path):
    words = f"train latents --data {{w}}/latents --out {{t}}/run {NARROW}"
    assert "--warmup 0" in diffussm(f"{words} --steps 2", w=work, t=tmp_path)
    said = diffussm(f"{words} --steps 24", w=work, t=tmp_path)
    assert "few" not in said and "24 steps done" in said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (stored["steps"], stored["warmup"]) == (24, 0)
    said = diffussm(f"{words} --steps 25 --warmup 3", 1, w=work, t=tmp_path)
    assert "its step 1 would have had another learning rate; steps" in said
    words = f"train digits --out {tmp_path}/cooled --batch_size 8 {NARROW}"
    diffussm(f"{words} --steps 6")
    said = diffussm(f"{words} --steps 9", 1)
    assert (
        "its cool-down has begun" in said and f"--init_from {tmp_path}/cooled" in said
    )


def test_what_was_typed_or_written_down_is_not_inferred(work, tmp_path):
    words = "train pixels --data {w}/images --out {t}/run --steps 2 --device cpu"
    (tmp_path / "some.yaml").write_text("batch_size: 20\nmodel:\n  num_classes: 3\n")
    for given in (
        "--model.num_classes 3 --batch_size 20",
        "--config {t}/some.yaml",
        '--model {{"num_classes":3}} --batch_size=20',
    ):
        said = diffussm(f"{words} {given}", 1, w=work, t=tmp_path)
        assert "add --model.num_classes 2 --batch_size 12" in said
    said = diffussm(f"{words} --warmup 3", 1, w=work, t=tmp_path)
    assert "warmup + cooldown=3 must fit into steps=2" in said and "few" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["some.yaml"]


def test_a_run_is_repeated_from_its_own_record(work, tmp_path):
    words = "train {w}/digits/config.json --out {t}/again --device cpu --no_grid"
    diffussm(words, w=work, t=tmp_path)
    theirs, ours = (
        json.loads((run / "config.json").read_text())
        for run in (work / "digits", tmp_path / "again")
    )
    assert theirs == ours
    theirs, ours = (
        run / "checkpoints/step_00000004/ema/model.safetensors"
        for run in (work / "digits", tmp_path / "again")
    )
    assert theirs.read_bytes() == ours.read_bytes()


def test_emoji_are_drawn_beside_the_run_in_its_size(tmp_path):
    words = f"train pixels --data openmoji --out {tmp_path}/runs/a --steps 1 {NARROW}"
    said = diffussm(f"{words} --model.input_size 8 --batch_size 4")
    assert "from openmoji: --model.num_classes 14" in said
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == [
        "a",
        "openmoji-8",
    ]
    stored = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert stored["recipe"]["data"] == "openmoji"
    drawn = list((tmp_path / "runs/openmoji-8/train").glob("*/*.png"))
    assert stored["data"]["images"] == len(drawn) > 500


def test_a_word_that_is_also_a_folder_is_refused_with_what_to_type(
    work, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(work / "images")
    (tmp_path / "openmoji").symlink_to(work / "images")
    words = f"pixels --out run --steps 2 {NARROW} --data"
    for data in ("digits", "openmoji"):
        said = diffussm(f"train {words} {data}", 1)
        assert f"--data {data}: " in said and f"type ./{data} for" in said
        assert said.splitlines()[-1] in diffussm(
            f"doctor {words} {data} --processes 1", 1
        ).replace("diffussm doctor", "diffussm train")
    assert not (tmp_path / "run").exists()
    assert "12 images" in diffussm(f"train {words} ./digits")
    held = "--score_every 50 --score_images 0 --held_out openmoji"
    said = diffussm(f"train digits --out b --steps 2 {NARROW} {held}", 1)
    assert "--held_out openmoji: " in said


def test_a_run_that_has_begun_or_has_such_a_name_takes_the_word(
    work, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = f"train digits --data digits {SMALL} --no_grid --out"
    for steps in (1, 2):  # the run's own folder is no data
        said = diffussm(f"{words} digits --steps {steps}")
        assert f"{steps} steps done" in said
    words = f"train digits {SMALL} --no_grid --out"  # a recipe's data are not typed
    assert "1 steps done" in diffussm(f"{words} run --steps 1")
    said = diffussm(f"{words} run --steps 2 --data digits")  # this run began with them
    assert "2 steps done" in said


def test_a_folder_inside_the_images_is_refused_before_anything_is_written(
    work, plain, tmp_path
):
    shutil.copytree(work / "images", tmp_path / "images")
    (tmp_path / "images/kept").mkdir()  # a class, by then
    before = listing(tmp_path)
    words = f"train pixels --data {tmp_path}/images --steps 2 {NARROW} --out {tmp_path}"
    for out in ("images/run", "images/cats/run", "images/kept"):
        said = diffussm(f"{words}/{out}", 1)
        assert "lies inside" in said and "name a folder outside" in said
        said = diffussm(f"{words}/{out} --processes 1".replace("train", "doctor"), 1)
        assert "FAIL  folder" in said and "lies inside" in said
    words = words.replace("/images --", "/pictures --")
    shutil.copytree(plain.folder / "images", tmp_path / "pictures")
    assert "lies inside" in diffussm(f"{words}/pictures/run", 1)
    assert "2 steps done" in diffussm(f"{words}/pictures/.run")  # not looked into
    assert "2 steps done" in diffussm(f"{words}/pictures-run")
    assert "2 steps done" in diffussm(f"{words}/pictures-run")
    assert before.items() <= listing(tmp_path).items()


def test_a_folder_inside_the_held_out_images_is_refused(work, tmp_path):
    shutil.copytree(work / "images", tmp_path / "val")
    words = f"pixels --data {work}/images --held_out {tmp_path}/val --score_every 50 "
    words += f"--score_images 0 --steps 2 {NARROW} --out {tmp_path}/val/run"
    assert "lies inside" in diffussm(f"train {words}", 1)
    assert "FAIL  held-out: " in diffussm(f"doctor {words} --processes 1", 1)
    assert not (tmp_path / "val/run").exists()


def test_a_run_goes_on_in_a_zip_or_a_store_that_its_folder_lies_in(work, tmp_path):
    shutil.copytree(work / "latents", tmp_path / "latents")
    words = f"train latents --data {tmp_path}/latents --out {tmp_path}/latents/run"
    for _ in range(2):
        assert "2 steps done" in diffussm(f"{words} --steps 2 {NARROW}")


@pytest.mark.parametrize(("rank", "left"), [("0", False), ("1", True)])
def test_a_start_that_is_refused_leaves_no_word_to_a_queue(
    tmp_path, monkeypatch, rank, left
):
    """Or the queue would start it again, for ever."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "preempted").write_text("asked to stop\n")
    monkeypatch.setenv("RANK", rank)
    diffussm(f"train digits --data {tmp_path}/absent --out {out} {SMALL}", code=1)
    assert (out / "preempted").exists() == left


def test_a_convolution_for_a_gpu_is_refused_before_the_first_file(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = diffussm(
        f"train digits --out {tmp_path}/run --convolution triton {SMALL}", code=1
    )
    assert "is for a GPU" in said and not (tmp_path / "run").exists()
