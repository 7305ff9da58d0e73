"""The command sample: grids and sets, and what they remember of the run."""

import json
import os
import signal

import numpy as np
from commands import diffussm, grid
from PIL import Image

from diffussm.latents import LatentStore


def test_sample_draws_a_row_per_class(work, tmp_path):
    words = (
        "sample --from {w}/digits --classes 3,7 --per_class 3 --steps 4 --device cpu "
        "--grid {t}/"
    )
    for name in ("first.png", "again.png", "other.png --seed 1"):
        diffussm(words + name, w=work, t=tmp_path)
    first, again, other = (
        (tmp_path / f"{name}.png").read_bytes() for name in ("first", "again", "other")
    )
    assert np.asarray(Image.open(tmp_path / "first.png")).shape == (2 * 52, 3 * 52)
    assert first == again != other
    assert "exists" in diffussm(words + "first.png", 1, w=work, t=tmp_path)
    assert (tmp_path / "first.png").read_bytes() == first
    diffussm(words + "first.png --overwrite --seed 1", w=work, t=tmp_path)
    assert (tmp_path / "first.png").read_bytes() == other


def test_sample_writes_a_set_of_decoded_images(work, tmp_path):
    words = (
        "sample --from {w}/latent-run --vae {w}/vae --preset paper-fid-unguided "
        "--count 6 --steps 2 "
        "--batch_size 4 --device cpu --out {t}/"
    )
    diffussm(words + "set.npz", w=work, t=tmp_path)
    with np.load(tmp_path / "set.npz", allow_pickle=False) as made:
        assert made["arr_0"].shape == (6, 16, 16, 3)
        images, labels = made["arr_0"], made["arr_1"].tolist()
    how = json.loads((tmp_path / "set.json").read_text())
    made_by = LatentStore(work / "latents").vae
    assert how["cfg_scale"] == 1.0
    assert how["vae"] == {
        "name": str(work / "vae"),
        "encoder_sha256": made_by["encoder_sha256"],
        "decoder_sha256": made_by["decoder_sha256"],
    }
    diffussm(words + "folder", w=work, t=tmp_path)
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "folder" / "000003.png")), images[3]
    )
    assert (
        list(json.loads((tmp_path / "folder" / "labels.json").read_text()).values())
        == labels
    )


def test_a_set_of_one_class_holds_that_class_and_says_so(work, tmp_path):
    words = (
        f"sample --from {work}/digits --count 5 --steps 2 --device cpu --classes 3 "
        f"--out {tmp_path}/threes"
    )
    diffussm(words)
    labels = json.loads((tmp_path / "threes" / "labels.json").read_text())
    assert labels == {f"{i:06d}.png": 3 for i in range(5)}
    assert json.loads((tmp_path / "threes" / "samples.json").read_text())[
        "classes"
    ] == [3]


def test_a_grid_honours_precision_and_clipping(work, tmp_path):
    drawn = {
        options: grid(
            work / "digits", tmp_path / "x.png", f"--steps 3 --classes 1 {options}"
        )
        for options in (
            "",
            "--precision bf16",
            "--clip_denoised false",
            "--clip_denoised true",
        )
    }
    assert drawn[""] == drawn["--clip_denoised true"]  # pixels are clipped
    assert len(set(drawn.values())) == 3


def test_nobody_draws_more_images_than_were_learnt_from_unless_they_say_so(
    work, tmp_path
):
    said = diffussm(f"sample --from {work}/digits --device cpu --out {tmp_path}/x", 1)
    assert (
        "50,000" in said
        and "1,438" in said
        and "--count" in said
        and not list(tmp_path.iterdir())
    )
    # 3 batches of 4, 2 steps, with and without the class
    said = diffussm(
        f"sample --from {work}/digits --device cpu --out {tmp_path}/x --count 9 "
        "--batch_size 4 --steps 2"
    )
    assert (
        "9 images in 3 batches of 4, 2 steps" in said
        and f" {12 * 2 * 2} passes" in said
    )


def test_samples_come_from_the_step_that_is_asked_for(plain, tmp_path):
    kept = sorted(path.name for path in (plain.run / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (1, 2, 3)]
    newest = grid(plain.run, tmp_path / "x.png", "")
    assert (
        newest
        == grid(plain.run, tmp_path / "x.png", "--step 3")
        != grid(plain.run, tmp_path / "x.png", "--step 1")
    )
    words = (
        f"sample --from {plain.run} --count 2 --steps 2 --device cpu --out "
        f"{tmp_path}/set --step 2"
    )
    diffussm(words)
    assert (
        json.loads((tmp_path / "set" / "samples.json").read_text())["checkpoint"]
        == "step_00000002"
    )
    assert "there are 1, 2, 3" in grid(
        plain.run, tmp_path / "y.png", "--step 7", code=1
    )


def test_a_schedule_of_30_timesteps_is_drawn_from_in_training_and_after(
    plain, tmp_path
):
    assert (plain.run / "samples.png").is_file() and len(
        list((plain.run / "samples").iterdir())
    ) == 3
    assert grid(plain.run, tmp_path / "x.png", "") == grid(
        plain.run, tmp_path / "x.png", "--steps 30"
    )
    assert "30 timesteps" in grid(plain.run, tmp_path / "y.png", "--steps 31", code=1)
    # a set is of a protocol, so its steps are not lowered without a word
    said = diffussm(
        f"sample --from {plain.run} --count 2 --device cpu --out {tmp_path}/set", 1
    )
    assert "--steps 250" in said and not (tmp_path / "set").exists()


def test_another_decoder_of_the_same_encoder_may_decode_and_is_recorded(work, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(work / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + 0.5
    save_file(tensors, file)
    words = (
        "sample --from {w}/latent-run --count 2 --steps 2 --device cpu --vae {v} "
        "--out {t}/"
    )
    diffussm(words + "mine.npz", w=work, v=work / "vae", t=tmp_path)
    diffussm(words + "other.npz", w=work, v=tmp_path / "vae", t=tmp_path)
    mine, other = (
        json.loads((tmp_path / f"{name}.json").read_text())["vae"]
        for name in ("mine", "other")
    )
    assert mine["encoder_sha256"] == other["encoder_sha256"]
    assert mine["decoder_sha256"] != other["decoder_sha256"]
    images = [
        np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
        for name in ("mine", "other")
    ]
    assert (images[1] - images[0]).mean() > 20


def test_ctrl_c_keeps_the_batches_of_a_set(work, tmp_path, monkeypatch):
    from diffussm import samples

    words = (
        f"sample --from {work}/digits --out {tmp_path}/set --count 6 --batch_size 2 "
        "--steps 2 --device cpu"
    )
    drawn, draw = [], samples.draw_batch

    def first_one(*arguments, **options):
        drawn.append(draw(*arguments, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(samples, "draw_batch", first_one)
        said = diffussm(words, 75)
    assert len(drawn) == 1 and "1 of 3 batches" in said and "draws the others" in said
    diffussm(words)
    assert len(list((tmp_path / "set").glob("*.png"))) == 6


def test_latents_are_not_clamped_to_the_range_of_pixels(work, tmp_path):
    said = diffussm(
        f"sample --from {work}/latent-run --vae {work}/vae --clip_denoised true "
        f"--grid {tmp_path}/a.png",
        code=1,
    )
    assert "--clip_denoised true" in said and not (tmp_path / "a.png").exists()
