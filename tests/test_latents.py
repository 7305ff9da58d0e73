"""The latent store (chapter 10): what is kept, what survives a kill, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffussm.data import BadImage, ImageFolder, TensorData, load_batch
from diffussm.latents import (
    LatentStore,
    LmdbImages,
    check_encoder,
    decode,
    encode,
    images_from,
    load_vae,
    make_plan,
    measure_scale,
    moments,
    npy_header,
    open_shard,
    read_manifest,
    sign_manifest,
    train_vae,
    vae_identity,
    verify_store,
)
from diffussm.training import Drawn

SIZE = 16
OPTIONS = {"batch_size": 4, "shard_size": 6, "progress": False}


def make_vae(seed: int = 0):
    """A random autoencoder, 2 times smaller latents with 4 channels."""
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vae, root) -> Path:
    """A store made in one go; read only."""
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


# what is stored


def test_store_holds_the_posterior_of_every_good_image_and_of_its_mirror_image(
    vae, root, whole
):
    folder = ImageFolder(root, SIZE)
    good = [i for i in range(len(folder)) if "a" not in Path(folder.path(i)).stem]
    store = LatentStore(whole)
    assert len(store) == len(good) == 20
    for place, i in enumerate(good):
        image = folder[i][0][None]
        for flipped in (False, True):
            q = vae.encode(image.flip(-1) if flipped else image).latent_dist
            stored = store.moments(torch.tensor([place]), torch.tensor([flipped]))[
                0
            ].float()
            torch.testing.assert_close(stored[0], q.mean[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(stored[1], q.logvar[0], rtol=2e-3, atol=2e-3)
        assert store[place][1] == store.labels[place] == folder.labels[i]
    mirrored = store.moments(torch.tensor([0]), torch.tensor([True])).flip(-1)
    assert not torch.allclose(mirrored, store.moments(torch.tensor([0])))


def test_store_is_a_data_set_that_training_draws_from(whole):
    store = LatentStore(whole)
    assert isinstance(store, Drawn)
    assert (
        store.classes == ("cats", "dogs")
        and store.num_classes == 2
        and store.flip is True
    )
    assert store.shape == (4, 8, 8) and store.scale == 0.5
    image, label = store[3]
    assert (
        image.shape == (4, 8, 8)
        and image.dtype == torch.float32
        and isinstance(label, int)
    )
    assert torch.equal(store[-1][0], store[len(store) - 1][0])
    with pytest.raises(IndexError):
        store[len(store)]
    with pytest.raises(IndexError):
        store.moments(torch.tensor([0, -1]))


def test_draws_have_the_posteriors_mean_and_deviation(whole):
    store = LatentStore(whole)
    draws = 4000
    indices, flips = torch.full((draws,), 7), torch.ones(draws, dtype=torch.bool)
    x0, labels = store.batch(
        indices,
        flips,
        torch.randn(draws, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    mean, log_variance = store.moments(indices[:1], flips[:1])[0].double()
    std = (log_variance / 2).exp()
    error = (x0.double().mean(0) - 0.5 * mean) / (
        0.5 * std / draws**0.5
    )  # (4, 8, 8), standard normal
    assert error.abs().max() < 5 and abs(error.std().item() - 1) < 0.2
    torch.testing.assert_close(x0.double().std(0), 0.5 * std, rtol=0.06, atol=0)
    assert labels.tolist() == [store[7][1]] * draws
    still, _ = store.batch(torch.tensor([7]), None, torch.zeros(1, 4, 8, 8))
    assert torch.equal(still[0], store[7][0])


def test_batch_in_any_order_is_its_images_one_by_one(whole):
    store = LatentStore(whole)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(1))
    flips = order % 2 == 0
    together = store.moments(order, flips)
    for k, i in enumerate(order):
        assert torch.equal(together[k], store.moments(i[None], flips[k : k + 1])[0])


def test_without_flips_the_store_is_half_as_large_and_flips_are_ignored(
    vae, root, whole, tmp_path
):
    store = encode(
        ImageFolder(root, SIZE), tmp_path / "o", vae, "test", **OPTIONS, flip=False
    )
    assert store.flip is False
    indices = torch.arange(len(store))
    assert torch.equal(
        store.moments(indices, indices < 9), LatentStore(whole).moments(indices)
    )


def test_shards_are_plain_npy_files(whole):
    store = LatentStore(whole)
    first = 0
    for shard in store.manifest["shards"]:
        array = np.load(whole / shard["name"], allow_pickle=False)
        assert (
            array.shape == (shard["images"], 2, 2, 4, 8, 8)
            and array.dtype == np.float16
        )
        assert np.array_equal(
            array[:, 0], store.moments(torch.arange(first, first + len(array))).numpy()
        )
        first += len(array)
    assert first == len(store)


@pytest.mark.parametrize(
    "shape", [(0, 1, 2, 4, 8, 8), (5,), (123456789, 2, 2, 4, 32, 32), (10**18,) * 6]
)
def test_npy_header_is_one_that_numpy_reads(shape, tmp_path):
    (tmp_path / "h").write_bytes(npy_header(shape))
    with (tmp_path / "h").open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (
            shape,
            False,
            np.dtype("<f2"),
        )
        assert file.tell() == len(npy_header(shape)) and file.tell() % 64 == 0


def test_broken_images_are_left_out_and_named(whole):
    manifest = read_manifest(whole)
    skipped = [name for shard in manifest["shards"] for name, _ in shard["skipped"]]
    assert skipped == ["dogs/004a.png", "dogs/017a.png"]
    assert all(
        "known format" in why
        for shard in manifest["shards"]
        for _, why in shard["skipped"]
    )


def test_shard_without_a_single_good_image_is_empty(vae, tmp_path):
    root = draw_images(tmp_path / "images", 3)
    store = encode(
        ImageFolder(root, SIZE),
        tmp_path / "o",
        vae,
        "t",
        batch_size=2,
        shard_size=1,
        progress=False,
    )
    assert [shard["images"] for shard in store.manifest["shards"]] == [1, 1, 1, 0, 0]
    assert (
        store.moments(torch.tensor([2, 0])).shape == (2, 2, 4, 8, 8)
        and verify_store(tmp_path / "o") == []
    )


def test_file_that_vanished_is_left_out_and_a_disk_that_fails_stops_the_encoding(
    vae, tmp_path, monkeypatch
):
    root = draw_images(tmp_path / "images", 3)
    folder = ImageFolder(root, SIZE)
    (root / "dogs" / "000.png").unlink()
    store = encode(folder, tmp_path / "o", vae, "t", **OPTIONS)
    left_out = {
        name: why
        for shard in store.manifest["shards"]
        for name, why in shard["skipped"]
    }
    assert left_out["dogs/000.png"] == "no longer there" and len(store) == 2

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr("diffussm.data._file_content", failing)
    with pytest.raises(OSError, match="Input/output"):
        encode(folder, tmp_path / "p", vae, "t", **OPTIONS)
    assert not (tmp_path / "p" / "manifest.json").exists()


# float16


class Posterior:
    def __init__(self, mean: float, logvar: float) -> None:
        self.mean, self.logvar = (
            torch.full((1, 4, 8, 8), mean),
            torch.full((1, 4, 8, 8), logvar),
        )


class Constant:
    """An autoencoder whose posterior is given."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, mean: float, logvar: float) -> None:
        self.posterior = Posterior(mean, logvar)

    def encode(self, images):
        return type("Output", (), {"latent_dist": self.posterior})


@pytest.mark.parametrize(
    "logvar", [-30.0, -29.99, -12.3, 0.0, 20.0]
)  # diffusers clamps to [-30, 20]
def test_log_variance_survives_float16(logvar):
    stored = moments(Constant(3.0, logvar), torch.zeros(1, 3, 16, 16))[0, 1].double()
    ratio = ((stored - logvar) / 2).exp()  # of standard deviations
    assert (ratio - 1).abs().max() < 0.005


@pytest.mark.parametrize(
    ("mean", "logvar"),
    [(1e5, 0.0), (-7e4, 0.0), (float("nan"), 0.0), (0.0, float("nan"))],
)
def test_moments_beyond_float16_are_refused(mean, logvar):
    with pytest.raises(ValueError, match="float16"):
        moments(Constant(mean, logvar), torch.zeros(1, 3, 16, 16))


def test_latents_do_not_depend_on_tf32():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul

    class Looking(Constant):
        def encode(self, images):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
            return super().encode(images)

    found = [setting.fp32_precision for setting in settings]
    try:
        for before in ("tf32", "ieee"):
            for setting in settings:
                setting.fp32_precision = before
            moments(Looking(3.0, 0.0), torch.zeros(1, 3, 16, 16))
            assert [setting.fp32_precision for setting in settings] == [before, before]
    finally:
        for setting, value in zip(settings, found, strict=True):
            setting.fp32_precision = value


def test_a_draw_cannot_be_told_from_the_encoders_own(vae, root, whole):
    from scipy.stats import ks_2samp

    draws, store = 2000, LatentStore(whole)
    folder = ImageFolder(root, SIZE)
    x0, _ = store.batch(
        torch.full((draws,), 3),
        None,
        torch.randn(draws, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    posterior = vae.encode(folder[3][0][None]).latent_dist
    generator = torch.Generator().manual_seed(1)
    own, measure = (
        0.5 * torch.cat([posterior.sample(generator) for _ in range(draws)])
        for _ in range(2)
    )

    def p(a, b):
        return ks_2samp(
            *(((z - measure.mean(0)) / measure.std(0)).flatten() for z in (a, b))
        ).pvalue

    assert p(x0, own) > 1e-3
    assert (
        p(own.mean(0) + 1.03 * (x0 - own.mean(0)), own) < 1e-6
    )  # it would notice three per cent


# resuming, several processes

FORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_latents import OPTIONS, SIZE, make_vae
from diffussm import latents
from diffussm.data import ImageFolder

def work(root, out, rank, size, fuse):
    vae, plain, events = make_vae(), latents.moments, 0
    def slowly(*arguments):
        time.sleep(0.01)
        return plain(*arguments)
    def counted(function):
        def call(*arguments):
            nonlocal events
            events += 1
            if events == abs(fuse) and fuse > 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if events == abs(fuse):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    latents.moments, Path.replace, os.fsync = slowly, counted(Path.replace), counted(os.fsync)
    latents.encode(ImageFolder(root, SIZE), out, vae, "test", rank=rank, world_size=size, **OPTIONS)

for line in sys.stdin:
    root, out, rank, size, fuse = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        try:
            work(root, out, int(rank), int(size), int(fuse))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forker:
    """Starts encoders that do not have to import torch first. Ends one when asked to, or by its own fuse."""

    def __init__(self) -> None:
        script = FORKER.format(tests=str(Path(__file__).parent))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self, root: Path, out: Path, rank: int = 0, size: int = 1, fuse: int = 0
    ) -> int:
        self.process.stdin.write(f"{root}\t{out}\t{rank}\t{size}\t{fuse}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=300)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory, vae) -> tuple[Path, dict[str, bytes]]:
    """120 images, and the store of them that ran through."""
    place = tmp_path_factory.mktemp("large")
    root = draw_images(place / "images", 120)
    encode(ImageFolder(root, SIZE), place / "whole", vae, "test", **OPTIONS)
    return root, content(place / "whole")


@pytest.mark.parametrize("seed", [0, 1])
def test_encode_killed_ten_times_is_byte_identical(forker, large, tmp_path, seed):
    root, expected = large
    rng, out, kills = random.Random(seed), tmp_path / "store", 0
    for attempt in range(10):
        # every other time at a random moment, else just before or after a file is flushed or renamed
        fuse = rng.choice([-1, 1]) * rng.randrange(1, 13) if attempt % 2 else 0
        child = forker.start(root, out, fuse=fuse)
        if not fuse:
            time.sleep(rng.uniform(0.02, 0.15))
            os.kill(child, signal.SIGKILL)
        kills += forker.wait() == -signal.SIGKILL
    assert kills == 10 and not (out / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert done, "nothing was finished before the last kill: the test shows nothing"
    forker.start(root, out)
    assert forker.wait() == 0
    assert content(out) == expected
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items()), (
        "finished shards were redone"
    )


def test_every_single_moment_of_flushing_and_renaming_may_be_the_last(
    forker, root, whole, tmp_path
):
    for fuse in [k if k % 2 else -k for k in range(1, 15)]:
        out = tmp_path / f"store{fuse}"
        forker.start(root, out, fuse=fuse)
        assert forker.wait() == -signal.SIGKILL
        forker.start(root, out)
        assert forker.wait() == 0
        assert content(out) == content(whole)


def test_two_ranks_make_the_bytes_of_one(vae, large, tmp_path):
    root, expected = large
    folder = ImageFolder(root, SIZE)
    assert (
        encode(folder, tmp_path / "o", vae, "test", rank=1, world_size=2, **OPTIONS)
        is None
    )
    with pytest.raises(FileNotFoundError, match="unfinished"):
        LatentStore(tmp_path / "o")
    assert (
        encode(folder, tmp_path / "o", vae, "test", rank=0, world_size=2, **OPTIONS)
        is not None
    )
    assert content(tmp_path / "o") == expected


def test_killed_with_three_ranks_and_resumed_with_two_at_once(
    large, forker, vae, tmp_path
):
    root, expected = large
    out = tmp_path / "store"
    for rank in range(3):
        forker.start(root, out, rank, 3, fuse=7)
        assert forker.wait() == -signal.SIGKILL
    other = Forker()
    try:
        forker.start(root, out, 0, 2)
        other.start(root, out, 1, 2)
        assert forker.wait() == other.wait() == 0
    finally:
        other.close()
    assert content(out) == expected


def test_impossible_ranks_and_sizes_are_refused(vae, root, tmp_path):
    for options in (
        {"rank": 2, "world_size": 2},
        {"batch_size": 0},
        {"shard_size": 0},
        {"workers": 0},
    ):
        with pytest.raises(ValueError, match="impossible"):
            encode(
                ImageFolder(root, SIZE),
                tmp_path / "o",
                vae,
                "t",
                **{**OPTIONS, **options},
            )
    assert not (tmp_path / "o").exists()


# refusals


def test_resuming_with_anything_else_is_refused_and_nothing_is_written(
    vae, root, copy, tmp_path
):
    before = content(copy)
    folder = ImageFolder(root, SIZE)
    cases = {
        "vae": lambda: encode(folder, copy, make_vae(1), "test", **OPTIONS),
        "image_size": lambda: encode(
            ImageFolder(root, 32), copy, vae, "test", **OPTIONS
        ),
        "data": lambda: encode(
            ImageFolder(draw_images(tmp_path / "more", 21), SIZE),
            copy,
            vae,
            "test",
            **OPTIONS,
        ),
        "flip": lambda: encode(folder, copy, vae, "test", **OPTIONS, flip=False),
        "shard_size": lambda: encode(
            folder, copy, vae, "test", **{**OPTIONS, "shard_size": 7}
        ),
        "classes": lambda: encode(
            ImageFolder(root, SIZE, conditional=False), copy, vae, "test", **OPTIONS
        ),
    }
    for what, attempt in cases.items():
        with pytest.raises(ValueError, match=what):
            attempt()
        assert content(copy) == before
    scaled = make_vae()
    scaled.register_to_config(scaling_factor=0.18215)
    with pytest.raises(ValueError, match=r"0\.18215"):
        encode(folder, copy, scaled, "test", **OPTIONS)


def test_same_autoencoder_from_another_place_may_go_on(vae, root, copy):
    before = content(copy)
    (copy / "shard-00001.json").unlink()
    assert encode(ImageFolder(root, SIZE), copy, vae, "/moved", **OPTIONS) is not None
    assert content(copy) == before


def test_folder_with_other_things_is_refused(vae, root, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        encode(ImageFolder(root, SIZE), tmp_path, vae, "test", **OPTIONS)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_latents_of_another_autoencoder_are_refused(vae, whole):
    store = LatentStore(whole)
    store.check_vae(vae)
    with pytest.raises(ValueError, match="encoder_sha256"):
        store.check_vae(make_vae(1))
    scaled = make_vae()
    scaled.register_to_config(scaling_factor=0.18215)
    with pytest.raises(ValueError, match="scaling_factor"):
        store.check_vae(scaled)


def test_another_decoder_of_the_same_encoder_is_welcome(vae, root, whole, copy):
    finetuned = make_vae()
    with torch.no_grad():
        finetuned.decoder.conv_out.bias.add_(0.1)
        finetuned.post_quant_conv.bias.add_(0.1)
    ours, theirs = vae_identity(vae, "original"), vae_identity(finetuned, "finetuned")
    assert ours["encoder_sha256"] == theirs["encoder_sha256"]
    assert ours["decoder_sha256"] != theirs["decoder_sha256"]
    LatentStore(whole).check_vae(finetuned)
    check_encoder(ours, theirs, "samples")
    (copy / "shard-00001.json").unlink()
    assert (
        encode(ImageFolder(root, SIZE), copy, finetuned, "finetuned", **OPTIONS)
        is not None
    )
    assert content(copy) == content(whole)


@pytest.mark.parametrize("part", ["encoder.conv_in", "quant_conv"])
def test_the_smallest_change_of_an_encoder_is_another_encoder(vae, whole, part):
    changed = make_vae()
    weight = changed.get_submodule(part).weight
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    assert (
        vae_identity(changed, "")["decoder_sha256"]
        == vae_identity(vae, "")["decoder_sha256"]
    )
    with pytest.raises(
        ValueError, match=r"made by the encoder of 'test' \(encoder_sha256"
    ):
        LatentStore(whole).check_vae(changed)


def test_a_record_that_names_no_encoder_is_refused_with_what_to_do(vae):
    with pytest.raises(
        ValueError, match=r"the latents of r names no encoder.*Encode the images again"
    ):
        check_encoder(
            {"sha256": "0", "scaling_factor": 0.5},
            vae_identity(vae, "x"),
            "the latents of r",
        )


def test_a_store_of_the_first_format_is_refused_with_what_to_do(vae, root, copy):
    for name in ("manifest.json", "plan.json"):
        content = json.loads((copy / name).read_text()) | {
            "format": "diffussm-latents-1"
        }
        (copy / name).write_text(json.dumps(content))
    for attempt in (
        lambda: LatentStore(copy),
        lambda: encode(ImageFolder(root, SIZE), copy, vae, "t", **OPTIONS),
    ):
        with pytest.raises(
            ValueError, match="encode the images again, into a new folder"
        ):
            attempt()


def test_the_plan_says_whether_images_were_turned_by_exif(vae, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    lying = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(lying).save(tmp_path / "images" / "a.png", exif=exif)
    stores = {}
    for turned in (False, True):
        images = images_from(tmp_path / "images", SIZE, exif_rotate=turned)
        stores[turned] = encode(images, tmp_path / f"{turned}", vae, "t", **OPTIONS)
        assert stores[turned].manifest["exif_rotate"] is turned
    upright = vae.encode(images.read(0)[None]).latent_dist.mean[0] * 0.5
    torch.testing.assert_close(stores[True][0][0], upright, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stores[False][0][0], upright, atol=0.05)
    with pytest.raises(ValueError, match="exif_rotate: there False, now True"):
        encode(images, tmp_path / "False", vae, "t", **OPTIONS)


class Pixels:
    """An autoencoder whose latents are the pixels."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(
        scaling_factor=1.0, latent_channels=3, block_out_channels=(1,)
    )

    def state_dict(self):
        return {}

    def encode(self, images):
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=images, logvar=torch.zeros_like(images))
        )


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_training_encoding_and_scoring_see_the_same_pixels(tmp_path, exif_rotate):
    from test_data import draw_weird

    from diffussm.evaluation import read_images

    truth = draw_weird(tmp_path / "weird")
    folder = images_from(tmp_path / "weird", 24, exif_rotate=exif_rotate)
    store = encode(folder, tmp_path / "o", Pixels(), "pixels", flip=False, **OPTIONS)
    refused = {name for name, expected in truth.items() if isinstance(expected, str)}
    assert {
        name for shard in store.manifest["shards"] for name, _ in shard["skipped"]
    } == refused
    good = [i for i in range(len(folder)) if folder.name(i) not in refused]
    assert len(store) == len(good) and store.classes == folder.classes
    for place, i in enumerate(good):
        levels = [((x + 1) * 127.5).round() for x in (store[place][0], folder[i][0])]
        assert torch.equal(*levels) and store[place][1] == folder[i][1], folder.name(i)
    scored = torch.cat(
        list(read_images(tmp_path / "weird", size=24, exif_rotate=exif_rotate))
    )
    trained = torch.stack([((folder[i][0] + 1) * 127.5).round() for i in good])
    assert torch.equal(scored.float(), trained)


def flushing_fails(monkeypatch, number):
    """Folders cannot be flushed; files can."""
    plain = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_flush_folders_is_warned_of_once(
    vae, root, whole, tmp_path, monkeypatch, caplog, number
):
    flushing_fails(monkeypatch, number)
    encode(ImageFolder(root, SIZE), tmp_path / "o", vae, "test", **OPTIONS)
    assert content(tmp_path / "o") == content(whole)
    assert [
        "cannot be flushed" in record.getMessage() for record in caplog.records
    ] == [True]


def test_a_disk_that_is_broken_does_stop_the_encoding(vae, root, tmp_path, monkeypatch):
    flushing_fails(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        encode(ImageFolder(root, SIZE), tmp_path / "o", vae, "test", **OPTIONS)


def test_images_that_do_not_divide_are_refused(vae, root, tmp_path):
    with pytest.raises(ValueError, match="multiples of 2"):
        encode(ImageFolder(root, 15), tmp_path / "o", vae, "t", **OPTIONS)


def test_truncated_shard_is_refused(copy):
    shard = copy / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        LatentStore(copy)
    assert len(verify_store(copy)) == 1


def test_missing_shard_is_refused(copy):
    (copy / "shard-00002.npy").unlink()
    with pytest.raises(FileNotFoundError):
        LatentStore(copy)
    assert len(verify_store(copy)) == 1


def test_truncated_or_missing_shard_is_made_again(vae, root, whole, copy):
    (copy / "shard-00002.npy").unlink()
    (copy / "shard-00000.npy").write_bytes(b"")
    encode(ImageFolder(root, SIZE), copy, vae, "test", **OPTIONS)
    assert content(copy) == content(whole)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_byte_anywhere_is_found(copy, seed):
    rng = random.Random(seed)
    assert verify_store(copy) == []
    file = rng.choice([*sorted(copy.glob("shard-*.npy")), copy / "manifest.json"])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    assert verify_store(copy) or same_json(
        file, data
    )  # where white space became other white space


def same_json(file: Path, data: bytes) -> bool:
    return file.suffix == ".json" and read_manifest(file.parent) == json.loads(data)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/this-must-never-exist",))


@pytest.mark.parametrize("form", ["pickle", "object array", "npz", "padded"])
def test_pickle_in_place_of_a_shard_is_refused_and_not_run(copy, form, tmp_path):
    shard, foreign = copy / "shard-00000.npy", tmp_path / "foreign.npy"
    size = shard.stat().st_size
    if form in ("object array", "padded"):
        np.save(foreign, np.array([Bomb()], dtype=object), allow_pickle=True)
    elif form == "npz":
        with foreign.open("wb") as file:
            np.savez(file, a=np.array([Bomb()], dtype=object))
    else:
        foreign.write_bytes(pickle.dumps(Bomb()))
    data = foreign.read_bytes()
    shard.write_bytes(data.ljust(size, b"\0")[:size] if form == "padded" else data)
    with pytest.raises(ValueError, match=r"truncated|does not begin"):
        LatentStore(copy)
    assert verify_store(copy) and not Path("/tmp/this-must-never-exist").exists()


# manifests that people and accidents write


@pytest.mark.parametrize(
    "name",
    [
        "../whole/shard-00000.npy",
        "/etc/passwd",
        "shard-00001.npy",
        "shard-0.npy",
        "",
        None,
        7,
    ],
)
def test_path_tricks_are_refused(copy, name):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (copy / "manifest.json").write_text(json.dumps(sign_manifest(manifest)))
    with pytest.raises(ValueError, match=r"expected a name, 'shard-00000\.npy'"):
        LatentStore(copy)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("shards", 0, "labels"), [[2, 6]]),  # there are two classes
        (("shards", 0, "labels"), [[-1, 6]]),
        (("shards", 0, "labels"), [[0, 5]]),  # and six images
        (("shards", 0, "labels"), [[0, 6], [1, 0]]),
        (("shards", 0, "labels"), [[True, 6]]),
        (("shards", 0, "labels"), [[0, 10**30]]),
        (("shards", 0, "labels"), [0] * 6),
        (("shards", 0, "images"), 6.0),
        (("shards", 0, "images"), -6),
        (("shards", 0, "sha256"), None),
        (("shards", 0), None),
        (("shards",), []),
        (("shards",), {}),
        (("vae", "scaling_factor"), 0),
        (("vae", "scaling_factor"), -0.5),
        (("vae", "scaling_factor"), float("nan")),
        (("vae", "scaling_factor"), 10**400),
        (("vae", "scaling_factor"), "0.5"),
        (("vae", "encoder_sha256"), 7),
        (("vae",), []),
        (("shape",), [4, 8]),
        (("shape",), [4, 8, 0]),
        (("shape",), [4, 8, 2**70]),
        (("shape",), [2, 16, 8.0]),
        (("flip",), 1),
        (("classes",), "cats"),
        (("classes",), [1, 2]),
        (("classes",), []),
        (("format",), "diffussm-latents-3"),
        (("format",), "diffussm-latents-1"),
    ],
)
def test_every_entry_that_matters_is_checked(copy, place, value):
    manifest = json.loads((copy / "manifest.json").read_text())
    target = manifest
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(sign_manifest(manifest)))
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        LatentStore(copy)


def test_changed_manifest_is_refused_even_where_it_makes_sense(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["vae"]["scaling_factor"] = 0.25
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="checksum"):
        LatentStore(copy)


def places(value, path=()):
    """The path of every value inside a JSON document."""
    yield path
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, -1]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_manifests_are_refused_or_harmless(copy, whole, data):
    manifest = json.loads((whole / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(manifest) if p]))
        target = manifest
        for key in path[:-1]:
            target = target[key]
        if data.draw(st.booleans()):
            target[path[-1]] = data.draw(JSON)
        else:
            del target[path[-1]]
        if not manifest:
            break
    if data.draw(st.booleans()):
        manifest = sign_manifest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = content(copy)
    try:
        store = LatentStore(copy)
    except (ValueError, OSError) as error:
        assert str(error)
        assert verify_store(copy)
    else:
        store.batch(
            torch.tensor([0, len(store) - 1]),
            torch.tensor([True, False]),
            torch.zeros(2, *store.shape),
        )
        assert max(store.labels.tolist()) < max(store.num_classes, 1)
    assert content(copy) == before


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.binary(max_size=300)
    | st.text().map(str.encode)
    | st.integers(1, 10**5).map(lambda n: b"[" * n)
)
def test_arbitrary_bytes_are_no_manifest(copy, noise):
    (copy / "manifest.json").write_bytes(noise)
    with pytest.raises((ValueError, OSError)):
        LatentStore(copy)
    assert len(verify_store(copy)) == 1


@pytest.mark.parametrize(
    "noise", [b"", b"[]", b"{}", b"null", b'{"vae": 3}', b"\xff", b"{" * 10000]
)
def test_damaged_plan_is_refused(vae, root, copy, noise):
    (copy / "plan.json").write_bytes(noise)
    with pytest.raises(ValueError, match=r"plan\.json"):
        encode(ImageFolder(root, SIZE), copy, vae, "test", **OPTIONS)


def test_damaged_record_makes_its_shard_again(vae, root, whole, copy):
    for number, noise in enumerate([b"", b"[]", b'{"images": -1}', b'{"images": "x"}']):
        (copy / f"shard-{number:05d}.json").write_bytes(noise)
    encode(ImageFolder(root, SIZE), copy, vae, "test", **OPTIONS)
    assert content(copy) == content(whole)


# autoencoders


def test_saved_autoencoder_loads_as_the_same(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    for folder in (
        tmp_path / "vae",
        tmp_path,
    ):  # Stable Diffusion's folders hold theirs in vae/
        loaded = load_vae(folder)
        assert vae_identity(loaded, "x") == vae_identity(vae, "x")
        assert not loaded.training and not any(
            p.requires_grad for p in loaded.parameters()
        )
    identity = vae_identity(vae, "x")
    assert (
        identity["scaling_factor"],
        identity["latent_channels"],
        identity["downsampling"],
    ) == (0.5, 4, 2)
    other = vae_identity(make_vae(1), "x")
    assert all(
        identity[key] != other[key] for key in ("encoder_sha256", "decoder_sha256")
    )


def test_autoencoder_that_is_not_there_is_refused_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_vae(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no config"):
        load_vae(tmp_path)


def test_hub_that_does_not_answer_is_told_with_advice(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    with pytest.raises(OSError, match="pass the folder"):
        load_vae("somebody/some-vae")


def test_damaged_autoencoders_are_refused(vae, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    vae.save_pretrained(tmp_path)
    complete = weights.read_bytes()
    tensors = {
        key: value.clone() for key, value in load_file(weights).items()
    }  # not mapped from the file
    weights.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ValueError, match="no usable"):
        load_vae(tmp_path)
    name = "quant_conv.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match=r"quant_conv|no usable"):
        load_vae(tmp_path)
    save_file(tensors | {"surplus": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"surplus|no usable"):
        load_vae(tmp_path)
    weights.unlink()
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")  # a pickle
    with pytest.raises(ValueError, match="no usable"):
        load_vae(tmp_path)


def test_decode_undoes_the_scaling(vae, whole):
    store = LatentStore(whole)
    x0 = torch.stack([store[i][0] for i in range(5)])
    images = decode(vae, x0, batch_size=2)
    expected = vae.decode(store.moments(torch.arange(5))[:, 0].float()).sample.clamp(
        -1, 1
    )
    assert images.shape == (5, 3, SIZE, SIZE)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_training_an_autoencoder_lowers_its_error_and_sets_its_scale():
    generator = torch.Generator().manual_seed(0)
    quarters = torch.rand(64, 3, 2, 2, generator=generator) * 2 - 1
    data = TensorData(quarters.repeat_interleave(8, 2).repeat_interleave(8, 3))
    options = {"channels": (4, 8), "crop": 16, "batch_size": 8, "progress": False}
    before, after = (train_vae(data, steps=steps, **options) for steps in (1, 150))
    x, _ = load_batch(data, torch.arange(64))
    error = [
        (vae.decode(vae.encode(x).latent_dist.mean).sample - x).abs().mean()
        for vae in (before, after)
    ]
    assert error[1] < 0.6 * error[0]
    scaled = after.encode(x).latent_dist.mean * after.config.scaling_factor
    assert abs(scaled.std() - 1) < 0.01
    assert not after.training and not any(p.requires_grad for p in after.parameters())
    again = train_vae(data, steps=150, **options)
    assert vae_identity(again, "") == vae_identity(after, "")


def test_the_kl_weight_is_that_of_latent_diffusion(monkeypatch):
    """Sums over an image and its latent, as there; a common factor changes nothing."""
    seen = {}

    def encoding(self, x, plain=AutoencoderKL.encode):
        seen["x"], out = x, plain(self, x)
        seen.setdefault("kl", out.latent_dist.kl())
        return out

    def decoding(self, z, plain=AutoencoderKL.decode):
        out = plain(self, z)
        seen["error"] = out.sample - seen["x"]
        return out

    def backward(loss, plain=torch.Tensor.backward):
        seen["loss"] = loss.item()
        plain(loss)

    monkeypatch.setattr(AutoencoderKL, "encode", encoding)
    monkeypatch.setattr(AutoencoderKL, "decode", decoding)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    data = TensorData(
        torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    train_vae(
        data,
        channels=(4, 8),
        crop=16,
        steps=1,
        batch_size=4,
        kl_weight=1.0,
        progress=False,
    )
    error = seen["error"].double()
    summed = (error.abs() + 3 * error.square()).sum() / 4 + seen[
        "kl"
    ].double().sum() / 4
    assert seen["kl"].mean() > 0.1 * summed  # it weighs enough to be seen
    assert seen["loss"] * 3 * 16 * 16 == pytest.approx(summed.item(), rel=1e-5)
    for wrong in ({"kl_weight": -1.0}, {"lr": 0.0}, {"kl_weight": float("nan")}):
        with pytest.raises(ValueError, match="not negative"):
            train_vae(data, channels=(4, 8), crop=16, steps=1, progress=False, **wrong)


def test_images_that_are_all_alike_have_no_scale():
    class Flat(Pixels):
        def encode(self, images):
            return super().encode(torch.zeros_like(images))

    with pytest.raises(ValueError, match="all alike"):
        measure_scale(Flat(), TensorData(torch.zeros(8, 3, 16, 16)))


@pytest.mark.parametrize(
    "wrong", [{"crop": 32}, {"crop": 15}, {"steps": 0}, {"channels": (6, 8)}]
)
def test_autoencoder_whose_sizes_do_not_fit_is_refused(wrong):
    options = {"channels": (4, 8), "crop": 16, "steps": 1, "progress": False} | wrong
    with pytest.raises(ValueError, match="crop"):
        train_vae(TensorData(torch.zeros(8, 3, 16, 16)), **options)


# images


@pytest.fixture(scope="module")
def lsun(root, tmp_path_factory) -> Path:
    """The good images of `root` and a broken one as an LMDB, with LSUN's kind of keys: hashes."""
    import hashlib

    import lmdb

    path = tmp_path_factory.mktemp("lsun") / "church_outdoor_train_lmdb"
    with (
        lmdb.open(str(path), map_size=1 << 22) as env,
        env.begin(write=True) as writing,
    ):
        for file in sorted(root.glob("*/*.png")):
            writing.put(
                hashlib.sha1(file.name.encode()).hexdigest().encode(), file.read_bytes()
            )
    (path / "lock.mdb").unlink()
    return path


def test_lmdb_equals_the_folder(root, lsun):
    import hashlib

    images = images_from(lsun, SIZE)
    folder = {
        hashlib.sha1(file.name.encode()).hexdigest(): file
        for file in root.glob("*/*.png")
        if "a" not in file.stem
    }
    assert isinstance(images, LmdbImages) and images.num_classes == 0
    assert len(images) == len(folder) + 2
    seen = 0
    for i in range(len(images)):
        name = images.key(i).decode()
        if name in folder:
            expected = ImageFolder(folder[name].parent, SIZE, conditional=False)
            where = [Path(expected.path(k)) for k in range(len(expected))].index(
                folder[name]
            )
            assert torch.equal(images[i][0], expected[where][0]) and images[i][1] == 0
            seen += 1
        else:
            with pytest.raises(BadImage):
                images.read(i)
    assert seen == len(folder)
    assert sorted(path.name for path in lsun.iterdir()) == ["data.mdb"], (
        "reading left a file behind"
    )
    with pytest.raises(ValueError, match="no classes; omit conditional"):
        images_from(lsun, SIZE, conditional=True)


def test_a_broken_record_is_listed_by_its_key_and_stepped_over(root, tmp_path, caplog):
    import lmdb

    good = sorted(root.glob("cats/*.png"))[:3]
    with (
        lmdb.open(str(tmp_path / "db"), map_size=1 << 22) as env,
        env.begin(write=True) as writing,
    ):
        for k, file in enumerate(good):
            writing.put(b"%d" % (2 * k), file.read_bytes())
        writing.put(b"1 broken", b"no image at all")
        writing.put(b"\xff bytes", b"")
    for order in (
        (0, 1, 2, 3, 4),
        (4, 3, 2, 1, 0),
    ):  # whoever meets it first, the substitute is the same
        images = images_from(tmp_path / "db", SIZE)
        seen = {i: images[i][0] for i in order}
        assert torch.equal(seen[1], images.read(2)) and torch.equal(
            seen[4], images.read(0)
        )
        assert sorted(name for name, _ in images.skipped) == ["1 broken", "\\xff bytes"]
        _ = [images[i] for i in order]
        assert len(images.skipped) == 2 and images.name(1) == "1 broken"
    assert len(caplog.records) == 4 and "1 broken" in caplog.text
    for i in (1, 4):
        with pytest.raises(BadImage):
            images.read(i)
    everything = images_from(tmp_path / "db", None)
    assert everything[0][0].shape == (3, SIZE, SIZE + 4)


def test_lmdb_travels_to_a_worker_and_is_opened_twice(lsun):
    images = images_from(lsun, SIZE, flip=True, exif_rotate=True)
    sent = pickle.dumps(images)
    twin = LmdbImages(lsun, SIZE)  # in the same process, which LMDB itself refuses
    arrived = pickle.loads(sent)
    assert torch.equal(arrived[3][0], images[3][0]) and torch.equal(
        twin[3][0], images[3][0]
    )
    assert arrived.flip and arrived.exif_rotate and arrived.key(3) == images.key(3)
    assert arrived.fingerprint == images.fingerprint != twin.fingerprint


def test_the_fingerprint_of_an_lmdb_is_of_its_keys(lsun, tmp_path):
    import lmdb

    def prints(*keys):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with (
            lmdb.open(str(folder), map_size=1 << 20) as env,
            env.begin(write=True) as writing,
        ):
            for key in keys:
                writing.put(key, b"x")
        return images_from(folder, SIZE).fingerprint

    assert (
        prints(b"a", b"b") == prints(b"b", b"a") != prints(b"ab") != prints(b"a", b"c")
    )


def test_lmdb_is_encoded_without_classes(vae, lsun, tmp_path):
    images = images_from(lsun, SIZE)
    store = encode(images, tmp_path / "o", vae, "t", **OPTIONS)
    assert store.num_classes == 0 and store.labels.tolist() == [0] * 20
    good = [i for i in range(len(images)) if not raises(images, i)]
    q = vae.encode(images[good[4]][0][None]).latent_dist
    torch.testing.assert_close(store[4][0], q.mean[0] * 0.5, rtol=2e-3, atol=2e-3)


def raises(images, i) -> bool:
    try:
        images.read(i)
    except BadImage:
        return True
    return False


def test_damaged_lmdb_is_refused(lsun, tmp_path):
    data = (lsun / "data.mdb").read_bytes()
    for noise in (b"", b"x" * 5000, data[:100], data[: len(data) // 2]):
        (tmp_path / "data.mdb").write_bytes(noise)
        with pytest.raises((OSError, ValueError)):
            images_from(tmp_path, SIZE)
    with pytest.raises(FileNotFoundError):
        LmdbImages(tmp_path / "nothing", SIZE)


def test_any_folder_of_images_is_understood(root, tmp_path):
    assert images_from(root, SIZE).classes == ("cats", "dogs")
    assert images_from(root / "cats", SIZE).num_classes == 0
    assert images_from(root, SIZE, conditional=False).num_classes == 0
    assert len(images_from(root, SIZE, conditional=False)) == 22
    with pytest.raises(FileNotFoundError):
        images_from(tmp_path / "nothing", SIZE)


def test_plan_knows_the_data_by_names_labels_and_pixels(vae, root):
    identity = vae_identity(vae, "t")
    options = {"batch_size": 4, "shard_size": 6, "flip": True}
    images = torch.rand(3, 3, 16, 16)
    plans = [
        make_plan(source, identity, **options)["data"]["sha256"]
        for source in (
            ImageFolder(root, SIZE),
            ImageFolder(root, SIZE, conditional=False),
            TensorData(images),
            TensorData(images.flip(0)),
            TensorData(images, torch.tensor([0, 1, 0])),
        )
    ]
    assert len(set(plans)) == len(plans)
    assert (
        plans[0]
        == make_plan(ImageFolder(root, SIZE), identity, **options)["data"]["sha256"]
    )


def test_open_shard_maps_and_does_not_read(tmp_path):
    shape = (1 << 20, 2, 2, 4, 32, 32)  # 32 GiB, of which nothing is on disk
    with (tmp_path / "s.npy").open("wb") as file:
        file.write(npy_header(shape))
        file.truncate(len(npy_header(shape)) + 2 * int(np.prod(shape)))
    shard = open_shard(tmp_path / "s.npy", shape)
    assert shard[12345, 1].max() == 0 and not shard.flags.writeable
