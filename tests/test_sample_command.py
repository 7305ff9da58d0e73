"""The command sample: grids and sets, and what they remember of the run."""

import json
import os
import signal

import numpy as np
import pytest
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
    height, width = np.asarray(Image.open(tmp_path / "first.png")).shape
    assert height == 2 * 52 and 3 * 52 < width < 4 * 52  # names stand beside the rows
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
    # 3 batches of 4, the last one whole too, 2 steps, with and without the class
    said = diffussm(
        f"sample --from {work}/digits --device cpu --out {tmp_path}/x --count 10 "
        "--batch_size 4 --steps 2"
    )
    assert (
        "10 images in 3 batches of 4, 2 steps" in said
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


def places(file, columns):
    """The places of a grid of digits, (rows, columns, 52, 52)."""
    grid = np.asarray(Image.open(file)).astype(int)[:, -52 * columns :]
    return grid.reshape(-1, 52, columns, 52).transpose(0, 2, 1, 3)


def same(a, b):
    """Other batches round in another way."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def test_scales_are_rows_and_seeds_are_columns(work, tmp_path):
    words = f"sample --from {work}/digits --steps 3 --device cpu --grid {tmp_path}/"
    options = "--classes 3,7 --cfg_scale 1,2.5 --seeds 0,4,2"
    said = diffussm(f"{words}x.png {options}")
    assert "cfg_scale 1: 6 images" in said and "cfg_scale 2.5: 6 images" in said
    assert "18 passes" in said and "36 passes" in said
    diffussm(f"{words}y.png --classes 7 --cfg_scale 2.5 --seeds 2,0")
    x, y = places(tmp_path / "x.png", 3), places(tmp_path / "y.png", 2)
    assert len(x) == 4 and same(y[0], x[3][[2, 0]]) and not same(y[0], x[1][[2, 0]])


def test_the_way_between_two_seeds_is_walked_by_ddim_and_ends_at_both(work, tmp_path):
    words = f"sample --from {work}/digits --classes 3 --steps 3 --device cpu --grid "
    diffussm(f"{words}{tmp_path}/way.png --interpolate 3,7 --per_class 5")
    diffussm(f"{words}{tmp_path}/ends.png --seeds 3,7 --method ddim")
    way, ends = places(tmp_path / "way.png", 5), places(tmp_path / "ends.png", 2)
    assert same(way[:, [0, 4]], ends) and not same(way[:, 2], ends[:, 0])


def test_a_gif_and_a_grid_show_the_same_walk(work, tmp_path):
    words = (
        f"sample --from {work}/digits --classes 3 --steps 3 --device cpu --seeds 0,1"
    )
    said = diffussm(f"{words} --grid {tmp_path}/x.png --gif {tmp_path}/x.gif")
    assert f"wrote {tmp_path}/x.gif" in said and f"wrote {tmp_path}/x.png" in said
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 3
        film.seek(2)
        last = np.asarray(film.convert("L")).astype(int)
    assert same(last[None, None, :, -104:-52], places(tmp_path / "x.png", 2)[:, :1])
    assert "exists" in diffussm(f"{words} --gif {tmp_path}/x.gif", 1)
    diffussm(f"{words} --gif {tmp_path}/x.gif --overwrite")
    latents = f"sample --from {work}/latent-run --vae {work}/vae --steps 2 --device cpu"
    diffussm(f"{latents} --per_class 2 --gif {tmp_path}/latents.gif")
    with Image.open(tmp_path / "latents.gif") as film:
        assert film.n_frames == 2 and film.height == 2 * 52


# diffusers' own, of NumPy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_schedulers_of_diffusers_draw_pictures_by_name(work, tmp_path):
    words = f"sample --from {work}/digits --classes 3 --steps 4 --device cpu --seeds 0 "
    drawn = {}
    for name in ("DDIM", "DDIMScheduler", "UniPCMultistep", "HeunDiscrete"):
        diffussm(f"{words} --scheduler {name} --grid {tmp_path}/{name}.png")
        drawn[name] = places(tmp_path / f"{name}.png", 1)
    diffussm(f"{words} --method ddim --grid {tmp_path}/ours.png")
    assert same(drawn["DDIM"], places(tmp_path / "ours.png", 1))
    assert np.array_equal(drawn.pop("DDIMScheduler"), drawn["DDIM"])
    assert len({one.tobytes() for one in drawn.values()}) == 3
    diffussm(f"{words} --scheduler HeunDiscrete --gif {tmp_path}/x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 7  # it asks the network twice for a step, but the last


def test_a_set_keeps_the_guidance_of_its_preset(work, tmp_path):
    words = f"sample --from {work}/digits --count 1 --steps 2 --device cpu --out "
    for name, options, scale in (
        ("a", "", 1.5),
        ("b", "--preset pretty", 4.0),
        ("c", "--cfg_scale 3", 3.0),
    ):
        diffussm(f"{words}{tmp_path}/{name} {options}")
        record = json.loads((tmp_path / name / "samples.json").read_text())
        assert record["cfg_scale"] == scale
