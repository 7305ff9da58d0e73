"""Pictures: bytes, grids, and the precision that they are drawn in."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm import pictures
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.pictures import (
    Grid,
    between_seeds,
    draw_grid,
    one_stream,
    save_grid,
    stream_per_seed,
    to_uint8,
)
from diffussm.sample_options import Sampler
from diffussm.sampling import walk
from diffussm.two_level import multiplying_in


def test_pixels_are_rounded_and_latents_refused():
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1)
    assert to_uint8(images)[:, 0, 0].tolist() == [
        [0] * 3,
        [128] * 3,
        [255] * 3,
        [255] * 3,
    ]
    with pytest.raises(ValueError, match="autoencoder"):
        to_uint8(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_float32_is_float32_and_tf32_is_named():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    with multiplying_in("tf32"):
        for precision in ("float32", "tf32", "bf16"):
            with pictures.computing_in(precision, torch.device("cpu")):
                found = {matmul.fp32_precision, conv.fp32_precision}
                assert found == {"ieee" if precision == "float32" else "tf32"}
                assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            assert matmul.fp32_precision == conv.fp32_precision == "tf32"


def test_kernels_are_exact_whatever_the_samples_are_drawn_in():
    model, seen = network(), []
    for block in model.blocks:
        block.ssm.forward_kernel.register_forward_hook(
            lambda *_: seen.append(torch.backends.cuda.matmul.fp32_precision)
        )
    x, t = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    how = pictures.computing_in("tf32", torch.device("cpu"))
    with how, torch.no_grad(), model.cached_kernels():
        model(x, t, torch.zeros(1, dtype=torch.int64))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert seen == ["ieee"]


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 48, 48)
    save_grid(images, 3, str(tmp_path / "grid.png"))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 52, 3 * 52, 3)
    seen = [grid[26 + 52 * (i // 3), 26 + 52 * (i % 3), 0] for i in range(6)]
    assert seen == [0, 51, 102, 153, 204, 255] and grid[0, 0, 0] == 255
    for wrong, columns, said in ((images[:, :2], 3, "latents"), (images, 4, "fill")):
        with pytest.raises(ValueError, match=said):
            save_grid(wrong, columns, tmp_path / "x.png")
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_a_grid_is_the_same_for_the_same_seed_with_and_without_classes(tmp_path):
    for classes in (0, 10):
        torch.manual_seed(0)
        config = DiffuSSMConfig(
            input_size=8, in_channels=1, num_classes=classes, d_model=16, n_blocks=1
        )
        model = DiffuSSM(config).eval()
        torch.nn.init.normal_(model.head.weight, std=0.2)
        drawn = []
        for seed in (0, 0, 1):
            file, steps = tmp_path / "grid.png", GaussianDiffusion.linear(30)
            draw_grid(model, steps, file, per_class=2, seed=seed, progress=False)
            drawn.append(file.read_bytes())
        assert drawn[0] == drawn[1] != drawn[2]
        rows = max(classes, 1)
        height, width = np.asarray(Image.open(file)).shape
        assert height == rows * 52 and (width > 2 * 52) == (classes > 0)


def network(num_classes=4, seed=0):
    torch.manual_seed(seed)
    config = DiffuSSMConfig(
        input_size=8, in_channels=1, num_classes=num_classes, d_model=16, n_blocks=1
    )
    model = DiffuSSM(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


DIFFUSION = GaussianDiffusion.linear(30)


def drawn(model, file, **options):
    """The places of a grid, (rows, columns, 52, 52), without what stands beside."""
    how = {"sampler": Sampler(8, "ddpm", cfg_scale=2.0, clip_denoised=True)} | options
    draw_grid(model, DIFFUSION, file, progress=False, **how)
    grid = np.asarray(Image.open(file)).astype(int)
    start = options.get("start") or partial(one_stream, 0, options.get("per_class"))
    columns = len(start(1, (1, 8, 8))[0])
    grid = grid[:, -52 * columns :]
    return grid.reshape(-1, 52, columns, 52).transpose(0, 2, 1, 3)


def seeds(*numbers):
    return partial(stream_per_seed, numbers)


def close(a, b):
    """Other batches round in another way."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def test_a_seed_gives_the_same_images_whatever_else_is_drawn(tmp_path):
    """With DDPM, which draws noise in every step."""
    model, file = network(), tmp_path / "x.png"
    many = drawn(
        model, file, start=seeds(0, 1, 2), classes=(3, 1, 2), cfg_scales=(1, 3)
    )
    assert many.shape[:2] == (6, 3)
    few = drawn(model, file, start=seeds(2, 0), classes=(2, 3), cfg_scales=(3,))
    assert close(few[0], many[5][[2, 0]]) and close(few[1], many[3][[2, 0]])
    assert not close(few[0], many[2][[2, 0]]) and not close(few[0, 0], few[0, 1])


def test_each_scale_is_the_grid_of_that_scale_alone(tmp_path):
    model, file, how = (
        network(),
        tmp_path / "x.png",
        {"classes": (3, 1), "per_class": 3},
    )
    three = drawn(model, file, cfg_scales=(1, 2, 4), **how)
    for block, scale in enumerate((1, 2, 4)):
        alone = drawn(model, file, cfg_scales=(scale,), **how)
        assert np.array_equal(alone, three[2 * block : 2 * block + 2])
    assert not close(three[:2], three[2:4])


def test_the_way_between_two_seeds_ends_at_both_and_stays_on_the_sphere(tmp_path):
    shape, ends = (3, 32, 32), (3, 7)
    way, later = between_seeds(ends, 9, 2, shape)
    assert later is None and torch.equal(way[:9], way[9:])
    a, b = stream_per_seed(ends, 1, shape)[0].double().flatten(1)

    def angle(x, y):
        return torch.arccos((x @ y / x.norm() / y.norm()).clamp(-1, 1)).item()

    for k, x in enumerate(way[:9].double().flatten(1)):
        assert 0.99 * b.norm() < x.norm() < 1.01 * a.norm()
        # a straight line would be 0.05 away at k = 1
        assert angle(x, a) == pytest.approx(k / 8 * angle(a, b), abs=0.02)
        assert angle(x, a) + angle(x, b) == pytest.approx(angle(a, b), abs=1e-3)
    model, file, how = network(), tmp_path / "x.png", {"classes": (3, 1)}
    ddim = {"sampler": Sampler(8, "ddim", clip_denoised=True)}
    path = drawn(model, file, start=partial(between_seeds, ends, 5), **how, **ddim)
    alone = drawn(model, file, start=seeds(*ends), **how, **ddim)
    assert close(path[:, [0, -1]], alone)
    steps = np.abs(np.diff(path, axis=1)).mean((0, 2, 3))
    assert (steps > 0).all() and steps.max() < np.abs(path[:, 0] - path[:, -1]).mean()


def test_words_stand_beside_their_rows_and_change_nothing_else(tmp_path):
    images = torch.full((4, 3, 48, 48), -1.0)
    words = ["cat", "a name\nof two lines that is far too long"]
    save_grid(images, 2, tmp_path / "plain.png")
    save_grid(images, 2, tmp_path / "words.png", words)
    plain, wide = (
        np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "words")
    )
    margin = wide.shape[1] - plain.shape[1]
    assert np.array_equal(wide[:, margin:], plain) and 60 < margin < 260
    ink = (wide[:, :margin] < 128).all(-1)
    assert ink[:52].any() and ink[52:].sum() > 3 * ink[:52].sum()  # a longer word
    assert not ink[[0, 1, 50, 51, 52, 53, -2, -1]].any() and not ink[:, -4:].any()


def test_names_are_those_of_the_classes_and_scales_only_where_there_are_several():
    names = ["tench, Tinca tinca", "dog"]
    assert Grid((1, 0, 2), names).words(3) == ["dog", "tench", "2"]
    assert Grid(None, names).words(2) == ["tench", "dog"]
    assert Grid((1,), names, (1.0, 2.5)).words(2) == ["dog, w = 1", "dog, w = 2.5"]
    assert Grid(None, names, (2.0,)).words(0) == []
    assert len(Grid().words(1000)) == 10


def test_a_film_shows_noise_beside_its_prediction_and_ends_at_the_grid(tmp_path):
    model, how = network(), {"start": seeds(0), "classes": (3, 1)}
    grid = drawn(model, tmp_path / "x.png", gif=tmp_path / "x.gif", **how)
    with Image.open(tmp_path / "x.gif") as film:
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("L")).astype(int))
        assert len(frames) == 8 and film.info["loop"] == 0
        assert film.info["duration"] == 2000
    width = frames[0].shape[1]
    left = [f[:, width - 2 * 52 - 24 : width - 52 - 24] for f in frames]
    right = [f[:, width - 52 :] for f in frames]
    assert close(right[-1], left[-1]) and close(left[-1], grid.reshape(-1, 52))
    # at the first of 8 moments there is noise on the left, and not on the right
    sampler = Sampler(8, "ddpm", cfg_scale=2.0, clip_denoised=True)
    noise, source = stream_per_seed([0], 2, (1, 8, 8))
    y = torch.tensor([3, 1])
    _, x, x0 = next(walk(sampler, model, DIFFUSION, y, generator=source, noise=noise))
    for shown, state in ((left, x), (right, x0)):
        save_grid(state, 1, tmp_path / "y.png")
        assert close(shown[0], np.asarray(Image.open(tmp_path / "y.png")).astype(int))


def test_a_film_of_many_steps_keeps_some_and_the_last(tmp_path):
    how = {"start": seeds(0), "classes": (1,)}
    counts = {}
    for steps in (1, 30, 90):
        long = GaussianDiffusion.linear(90)
        sampler = Sampler(steps, "ddpm", clip_denoised=True)
        draw_grid(
            network(),
            long,
            None,
            gif=tmp_path / "x.gif",
            sampler=sampler,
            progress=False,
            **how,
        )
        with Image.open(tmp_path / "x.gif") as film:
            counts[steps] = film.n_frames
    assert counts == {1: 1, 30: 30, 90: 30} and not list(tmp_path.glob("*.png"))
