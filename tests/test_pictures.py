"""Pictures: bytes, grids, and the precision that they are drawn in."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm import pictures
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.pictures import draw_grid, save_grid, to_uint8


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


def test_float32_is_float32_on_a_gpu_and_tf32_is_named(monkeypatch):
    gpu, before = torch.device("cuda", 0), torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    try:
        torch.set_float32_matmul_precision("highest")
        for precision, products in (
            ("float32", "highest"),
            ("tf32", "high"),
            ("bf16", "high"),
        ):
            with pictures.computing_in(precision, gpu):
                assert torch.get_float32_matmul_precision() == products
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 48, 48)
    save_grid(images, 3, tmp_path / "grid.png")
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
        grid = np.asarray(Image.open(file))
        assert grid.shape == (rows * 52, 2 * 52)
