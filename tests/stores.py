"""A small random autoencoder and images, for the tests of latents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.folders import ImageFolder

SIZE = 16
OPTIONS = {"batch_size": 4, "shard_size": 6, "progress": False}


def make_vae(seed: int = 0):
    """A random autoencoder, 2 times smaller latents with 4 channels."""
    from diffusers import AutoencoderKL  # here, for every test process reads this file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=4,
            mid_block_add_attention=False,
            scaling_factor=0.5,
        )
    return vae.requires_grad_(False).eval()


def draw_images(root: Path, count: int = 20, seed: int = 0) -> Path:
    """Class folders with random images and, in the second class, two broken files."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = root / ("cats" if i % 3 else "dogs") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE + 4, 3), dtype=np.uint8)).save(
            path
        )
    for name in ("004a.png", "017a.png"):
        (root / "dogs" / name).write_bytes(b"no image at all")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def one_thread():
    """A second thread would mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vae():
    """The random autoencoder; not to be changed."""
    return make_vae()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two class folders of images; read only."""
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vae, root) -> Path:
    """A store made in one go; read only."""
    from diffussm.encoding import encode

    out = tmp_path_factory.mktemp("stores") / "whole"
    assert encode(ImageFolder(root, SIZE), out, vae, "test", **OPTIONS) is not None
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same store, to be damaged."""
    folder = tmp_path / "store"
    folder.mkdir()
    for name, data in content(whole).items():
        (folder / name).write_bytes(data)
    return folder
