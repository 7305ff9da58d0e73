"""Chapter 8: digits, OpenMoji, folders, ADM's crop, the order of samples, and odd files."""

import errno
import hashlib
import io
import itertools
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from diffussm import data
from diffussm.data import (
    BadImage,
    ImageFolder,
    TensorData,
    batch_flips,
    batch_indices,
    center_crop,
    decode_image,
    digits,
    draw_openmoji,
    generator,
    load_batch,
    random_bits,
    read_image,
    sample_order,
    scan,
    stratified_split,
)


def noise_image(width, height, seed=0):
    """Smooth random colours: edges everywhere, but nothing that JPEG would destroy."""
    small = np.random.default_rng(seed).integers(
        0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8
    )
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# order


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_each_epoch_is_a_permutation(n):
    for epoch in range(5):
        assert sorted(sample_order(n, 11, epoch).tolist()) == list(range(n))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 12), (7, 5), (9, 1)])
def test_batches_are_windows_on_the_row_of_epochs(n, batch_size):
    row = torch.cat([sample_order(n, 4, e) for e in range(40 * batch_size // n + 2)])
    for step in reversed(range(40)):
        window = row[step * batch_size : (step + 1) * batch_size]
        assert torch.equal(batch_indices(n, batch_size, step, 4), window)


def test_every_image_is_seen_equally_often_across_epoch_ends():
    n, batch_size = 10, 4
    seen = Counter(
        i
        for step in range(5 * n)
        for i in batch_indices(n, batch_size, step, 0).tolist()
    )
    assert set(seen.values()) == {5 * batch_size}


def test_order_does_not_depend_on_the_number_of_ranks():
    whole = batch_indices(100, 12, 17, 1)
    for ranks in (1, 2, 3, 4, 6):
        parts = [batch_indices(100, 12, 17, 1)[rank::ranks] for rank in range(ranks)]
        assert torch.equal(torch.stack(parts, 1).flatten(), whole)


def test_order_is_the_same_in_another_process_and_touches_no_global_generator():
    code = (
        "from diffussm.data import batch_flips, batch_indices;"
        "print(batch_indices(50, 20, 7, 3).tolist(), batch_flips(50, 20, 7, 3).int().tolist())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    torch.manual_seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    here = f"{batch_indices(50, 20, 7, 3).tolist()} {batch_flips(50, 20, 7, 3).int().tolist()}"
    assert other.strip() == here
    assert (
        torch.equal(torch.get_rng_state(), before)
        and (np.random.get_state()[1] == before_numpy).all()
    )


# of (0, "noise", 17), worked out with the plain integers of the test below
GOLDEN_BITS = 0xB8EF422D97F05F90


def test_random_bits_are_splitmix64():
    """Plain integers against the arrays, and the published first outputs of SplitMix64 from state 0."""
    mask = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    assert [mix(golden * k & mask) for k in (1, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]
    key = int.from_bytes(hashlib.sha256(b"5/flips").digest()[:8], "little")
    numbers = [*range(10), 2**63, 2**64 - 1]
    expected = [mix((key + golden * i) & mask) for i in numbers]
    assert random_bits(5, "flips", np.array(numbers, np.uint64)).tolist() == expected
    assert [int(random_bits(5, "flips", i)) for i in numbers] == expected
    # what a run that lasts for weeks stands on must not move with a version of anything
    assert int(random_bits(0, "noise", 17)) == GOLDEN_BITS
    assert generator(0, "noise", 17).initial_seed() == GOLDEN_BITS


def test_every_seed_purpose_and_number_has_draws_of_its_own():
    # sampling once started its batches from the noise of the first training steps, bit for bit
    words = "timesteps noise posterior samples grid weights crops"
    purposes = [*words.split(), "label dropout"]
    keys = list(itertools.product((0, 1, 10), purposes, (0, 1, 17)))
    draws = {tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    again = torch.rand(4, generator=generator(*keys[5]))
    assert torch.equal(again, torch.rand(4, generator=generator(*keys[5])))


def test_changing_the_returned_order_changes_nothing():
    sample_order(20, 0, 0).zero_()
    assert sorted(sample_order(20, 0, 0).tolist()) == list(range(20))


def test_seed_and_epoch_matter_and_epochs_are_uncorrelated():
    orders = [
        sample_order(500, seed, epoch).double()
        for seed in range(4)
        for epoch in range(4)
    ]
    correlation = torch.corrcoef(torch.stack(orders)) - torch.eye(16)
    assert correlation.abs().max() < 5 / 500**0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 0, 0), "data set has 10 images"),
        ((10, 0, 0, 0), "batch_size is 0"),
        ((0, 1, 0, 0), "n is 0"),
        ((10, 2, -1, 0), "step is -1"),
        ((10, 2, 0, -3), "seed is -3"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)


def test_a_step_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match=r"step is 1\.5"):
        batch_indices(10, 2, 1.5, 0)


# flips and batches


def asymmetric(n, flip):
    return TensorData(
        torch.linspace(-1, 1, n * 12).reshape(n, 1, 3, 4), torch.arange(n), flip=flip
    )


def test_flips_mirror_left_to_right_and_flipping_twice_is_nothing():
    dataset, indices, flips = (
        asymmetric(30, True),
        batch_indices(30, 20, 1, 0),
        batch_flips(30, 20, 1, 0),
    )
    assert 0 < flips.sum() < 20
    x, y = load_batch(dataset, indices, flips)
    assert torch.equal(y, indices)
    for k, i in enumerate(indices.tolist()):
        plain = dataset.images[i]
        assert torch.equal(x[k], plain[..., [3, 2, 1, 0]] if flips[k] else plain)
    x[flips] = x[flips].flip(-1)
    assert torch.equal(x, load_batch(dataset, indices)[0])


def test_flips_are_ignored_where_the_data_set_forbids_them():
    dataset, indices = asymmetric(10, False), torch.arange(10)
    assert torch.equal(
        load_batch(dataset, indices, torch.ones(10, dtype=torch.bool))[0],
        dataset.images,
    )


def test_the_coin_belongs_to_seed_epoch_and_index_not_to_the_batch():
    n = 12
    coins = {}
    for batch_size in (5, 12, 7):
        for step in range(4 * n // batch_size):
            positions = range(step * batch_size, (step + 1) * batch_size)
            batch = zip(
                positions,
                batch_indices(n, batch_size, step, 9),
                batch_flips(n, batch_size, step, 9),
                strict=True,
            )
            for position, index, coin in batch:
                assert coins.setdefault(
                    (position // n, int(index)), bool(coin)
                ) == bool(coin)
    assert len(coins) >= 3 * n and 0.2 < sum(coins.values()) / len(coins) < 0.8


def test_the_coin_is_fair_and_independent_of_the_order():
    flips = torch.cat([batch_flips(1000, 1000, e, 0) for e in range(20)]).double()
    places = torch.arange(1000.0).repeat(20).double()
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / 20_000**0.5
    assert torch.corrcoef(torch.stack([flips, places]))[0, 1].abs() < 4 / 20_000**0.5


# tensors


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, TypeError, "uint8"),
        (
            torch.full((2, 1, 8, 8), 1.01),
            None,
            ValueError,
            r"expected finite values in \[-1, 1\]",
        ),
        (torch.tensor(float("nan")).expand(2, 1, 8, 8), None, ValueError, "nan"),
        (torch.zeros(2, 8, 8), None, ValueError, "expected .n, C, H, W."),
        (torch.zeros(0, 1, 8, 8), None, ValueError, "n > 0"),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            "one per image",
        ),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), TypeError, "expected integers"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]), ValueError, "start at -1"),
    ],
)
def test_tensors_that_cannot_be_right_are_refused(images, labels, error, message):
    with pytest.raises(error, match=message):
        TensorData(images, labels)


def test_unlabelled_tensors_have_no_classes():
    dataset = TensorData(torch.zeros(2, 1, 8, 8))
    assert dataset.num_classes == 0 and dataset.classes == () and dataset[1][1] == 0


# digits


def test_digits_split_is_disjoint_complete_and_stratified():
    parts = {split: digits(split) for split in ("all", "train", "test")}
    pixels = {
        split: Counter(tuple(x.flatten().tolist()) for x in images)
        for split, (images, _) in parts.items()
    }
    assert (
        pixels["train"] + pixels["test"] == pixels["all"] and len(pixels["all"]) == 1797
    )
    share = parts["test"][1].bincount() / parts["all"][1].bincount()
    assert (share - 0.2).abs().max() <= 0.5 / parts["all"][1].bincount().min()


def test_digits_are_scikit_learns_levels_over_eight_minus_one():
    from sklearn.datasets import load_digits

    images, labels = digits("all")
    assert (
        images.shape == (1797, 1, 8, 8)
        and images.dtype == torch.float32
        and labels.dtype == torch.int64
    )
    np.testing.assert_array_equal((images[:, 0].numpy() + 1) * 8, load_digits().images)
    np.testing.assert_array_equal(labels.numpy(), load_digits().target)


def test_digits_split_is_a_function_of_the_seed():
    assert torch.equal(digits("test", seed=5)[0], digits("test", seed=5)[0])
    assert not torch.equal(digits("test", seed=5)[0], digits("test", seed=6)[0])


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match=r"'valid'.*'train', 'test' or 'all'"):
        digits("valid")
    for share in (0, 1, -0.1, 20):
        with pytest.raises(ValueError, match=r"strictly between"):
            stratified_split(torch.zeros(10, dtype=torch.int64), share)


# the crop


def resize_matrix(n_in, n_out, kernel, radius):
    """How much of each input pixel goes into each output pixel: filter stretched by the scale, normalised.

    Halving 4k + 1 pixels leaves the middle one exactly between two boxes, where round-off decides.
    """
    scale = n_in / n_out
    distance = (
        (np.arange(n_in) + 0.5)[None] - (np.arange(n_out) + 0.5)[:, None] * scale
    ) / max(scale, 1)
    weights = np.where(np.abs(distance) <= radius, kernel(distance), 0)
    return weights / weights.sum(1, keepdims=True)


def keys(d, a=-0.5):
    d = np.abs(d)
    return np.where(
        d < 1, (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    )


def slow_crop(x, size):
    h, w = x.shape[:2]

    def resized(x, h, w, kernel, radius):
        for axis, n in ((1, w), (0, h)):
            x = np.moveaxis(
                np.tensordot(
                    resize_matrix(x.shape[axis], n, kernel, radius), x, (1, axis)
                ),
                0,
                axis,
            )
            x = np.clip(np.floor(x + 0.5), 0, 255)
        return x

    while min(h, w) >= 2 * size:
        h, w = h // 2, w // 2
        x = resized(x, h, w, lambda d: (d > -0.5) & (d <= 0.5), 0.5)
    h, w = round(h * size / min(h, w)), round(w * size / min(h, w))
    x = resized(x, h, w, keys, 2)
    top, left = (h - size) // 2, (w - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape",
    [
        (64, 64),
        (63, 130),
        (199, 127),
        (512, 400),
        (20, 33),
        (127, 128),
        (1, 9),
        (256, 64),
    ],
)
@pytest.mark.parametrize("size", [16, 32, 47])
def test_crop_equals_its_slow_definition(shape, size):
    image = noise_image(*shape)
    fast, slow = (
        np.asarray(center_crop(image, size)),
        slow_crop(np.asarray(image).astype(float), size),
    )
    assert fast.shape == (size, size, 3)
    assert (
        np.abs(fast - slow).max() <= 2
    )  # Pillow's fixed-point weights, once per resize


def test_halving_is_the_mean_of_two_by_two():
    x = np.asarray(noise_image(64, 64)).astype(float)
    halved = x.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(noise_image(64, 64), 32)) - halved).max() <= 1


def test_a_square_of_the_right_size_is_untouched():
    image = noise_image(32, 32)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), np.asarray(image))


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (97, 32), (32, 33)])
def test_crop_keeps_the_middle(shape):
    x = np.asarray(noise_image(*shape))
    top, left = (shape[1] - 32) // 2, (shape[0] - 32) // 2
    np.testing.assert_array_equal(
        np.asarray(center_crop(noise_image(*shape), 32)),
        x[top : top + 32, left : left + 32],
    )


def test_crop_commutes_with_transposing():
    image = noise_image(150, 90)
    turned = center_crop(image.transpose(Image.Transpose.TRANSPOSE), 32).transpose(
        Image.Transpose.TRANSPOSE
    )
    assert (
        np.abs(
            np.asarray(turned).astype(int) - np.asarray(center_crop(image, 32))
        ).max()
        <= 2
    )


def test_size_zero_is_refused():
    with pytest.raises(ValueError, match="size is 0; expected 1 or more"):
        center_crop(noise_image(8, 8), 0)


# odd files that are converted


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    decoded = np.asarray(decode_image(encoded(Image.fromarray(levels), "PNG")))
    np.testing.assert_array_equal(
        decoded, np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2)
    )


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparency_shows_the_background(background):
    rgba = noise_image(16, 16).convert("RGBA")
    rgba.paste((0, 0, 0, 0), (0, 0, 8, 16))
    palette = Image.fromarray(
        np.where(np.arange(256).reshape(16, 16) % 16 < 8, 0, 1).astype(np.uint8)
    )
    palette.putpalette([0, 0, 0, 9, 9, 9])
    grey_alpha = Image.merge("LA", [Image.new("L", (16, 16), 9), rgba.getchannel("A")])
    for content in (
        encoded(rgba, "PNG"),
        encoded(palette, "PNG", transparency=0),
        encoded(grey_alpha, "PNG"),
    ):
        decoded = np.asarray(decode_image(content, background))
        assert (decoded[:, :8] == background).all()
        assert not (decoded[:, 8:] == background).all(-1).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # stored = upright, transposed so that EXIF's advice restores it
    inverse = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}
    upright, exif = noise_image(24, 16), Image.Exif()
    exif[0x0112] = orientation
    stored = (
        upright
        if orientation == 1
        else upright.transpose(Image.Transpose(inverse[undo[orientation]]))
    )
    np.testing.assert_array_equal(
        np.asarray(decode_image(encoded(stored, "PNG", exif=exif), exif_rotate=True)),
        np.asarray(upright),
    )
    as_stored = np.asarray(
        decode_image(encoded(stored, "PNG", exif=exif))
    )  # ADM's behaviour, the default
    np.testing.assert_array_equal(as_stored, np.asarray(stored))


def test_damaged_exif_costs_only_the_rotation():
    plain = encoded(
        noise_image(24, 16),
        "JPEG",
        exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage",
        quality=95,
    )
    assert (
        decode_image(plain).size
        == decode_image(plain, exif_rotate=True).size
        == (24, 16)
    )


def test_cmyk_keeps_its_colours():
    colours = Image.new("RGB", (48, 16), (200, 30, 30))
    colours.paste((30, 30, 200), (24, 0, 48, 16))
    decoded = np.asarray(
        decode_image(encoded(colours.convert("CMYK"), "JPEG", quality=95))
    ).astype(int)
    assert (
        np.abs(decoded[8, 4] - (200, 30, 30)).max() < 12
        and np.abs(decoded[8, 44] - (30, 30, 200)).max() < 12
    )


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    decoded = decode_image(
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    )
    assert decoded.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_every_common_mode_becomes_rgb(mode):
    decoded = decode_image(encoded(noise_image(9, 7).convert(mode), "PNG"))
    assert decoded.mode == "RGB" and decoded.size == (9, 7)


def test_a_strip_one_pixel_wide_becomes_a_square(tmp_path):
    x = read_image(
        write(tmp_path / "strip.png", encoded(noise_image(1, 200), "PNG")), 32
    )
    assert x.shape == (3, 32, 32) and torch.isfinite(x).all()


# odd files that are refused


def png(width, height, body=b""):
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(body)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b))
        for kind, b in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = encoded(noise_image(120, 80), "JPEG", quality=95)
BROKEN = {
    "empty.jpg": (b"", "empty file"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "text.jpg": (b"<html>not found</html>", "not an image"),
    "script.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "not an image",
    ),
    "gigapixel.png": (png(50_000, 50_000), "limit"),
    "large.png": (
        encoded(Image.new("1", (12_000, 12_000)), "PNG"),
        "12000 x 12000 pixels; the limit",
    ),
    "float.tiff": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "no agreed range"),
    "deep.tiff": (encoded(Image.new("I", (8, 8), 1 << 20), "TIFF"), "no agreed range"),
    "no_pixels.png": (png(8, 8), "cannot be decoded"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("error")
def test_a_broken_file_is_refused_with_its_reason(name):
    content, reason = BROKEN[name]
    with pytest.raises(BadImage, match=reason):
        decode_image(content)


def test_a_strip_that_would_grow_beyond_memory_is_refused():
    with pytest.raises(BadImage, match="too elongated: 1 x 4000000"):
        center_crop(Image.new("L", (1, 4_000_000)), 64)


def test_random_damage_never_raises_anything_else():
    sources = [
        JPEG,
        encoded(noise_image(40, 30), "PNG"),
        encoded(noise_image(40, 30), "GIF"),
        encoded(noise_image(40, 30), "WEBP"),
    ]
    rng, refused = np.random.default_rng(0), 0
    for trial in range(400):
        content = bytearray(sources[trial % 4])
        for place in rng.integers(0, len(content), rng.integers(1, 8)):
            content[place] = rng.integers(256)
        try:
            assert (
                decode_image(
                    bytes(
                        content[: rng.integers(1, len(content) + 1)]
                        if trial % 3 == 0
                        else content
                    )
                ).mode
                == "RGB"
            )
        except BadImage:
            refused += 1
    assert 0 < refused < 400


# folders


@pytest.fixture
def zoo(tmp_path):
    for c, name in enumerate(("b_second", "a_first", "c_third")):
        for k in range(3):
            write(
                tmp_path / "zoo" / name / f"{k}.JPEG",
                encoded(noise_image(40, 30, 10 * c + k), "JPEG"),
            )
    return tmp_path / "zoo"


def test_labels_are_the_places_of_the_sorted_class_folders(zoo):
    folder = ImageFolder(zoo, 16)
    assert (
        folder.classes == ("a_first", "b_second", "c_third") and folder.num_classes == 3
    )
    expected = [
        (name, f"{k}.JPEG")
        for name in sorted(p.name for p in zoo.iterdir())
        for k in range(3)
    ]
    assert [Path(folder.path(i)).parts[-2:] for i in range(9)] == expected
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i in range(9):
        x, y = folder[i]
        assert (
            x.shape == (3, 16, 16)
            and x.dtype == torch.float32
            and -1 <= x.min() < x.max() <= 1
            and y == i // 3
        )
        expected = np.asarray(
            center_crop(Image.fromarray(opened(folder.path(i)).astype(np.uint8)), 16)
        )
        expected = expected.transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)


def test_an_index_outside_is_an_index_error(zoo):
    folder = ImageFolder(zoo, 16)
    assert torch.equal(folder[-1][0], folder[8][0])
    with pytest.raises(IndexError):
        folder[9]


def test_nested_upper_case_and_linked_files_are_found_and_a_circle_ends(zoo):
    write(zoo / "a_first" / "deep" / "er" / "x.PNG", encoded(noise_image(8, 8), "PNG"))
    os.symlink(zoo, zoo / "a_first" / "circle")
    os.symlink(zoo / "b_second", zoo / "linked")
    folder = ImageFolder(zoo, 8)
    assert "x.PNG" in {Path(folder.path(i)).name for i in range(len(folder))}
    assert folder.labels.bincount().tolist() == [
        4,
        3,
        3,
        3,
    ]  # the circle brings no pictures of other classes
    assert folder.classes == ("a_first", "b_second", "c_third", "linked")


def test_other_files_are_listed_and_hidden_ones_passed_over(zoo):
    write(zoo / "a_first" / "readme.txt", b"hello")
    write(zoo / "a_first" / "._0.JPEG", b"hidden")
    write(zoo / "stray.jpg", JPEG)
    folder = ImageFolder(zoo, 16)
    assert len(folder) == 9
    assert [(Path(path).name, reason) for path, reason in folder.skipped] == [
        ("stray.jpg", "lies beside the class folders, in none of them"),
        ("readme.txt", "not an image by its name (.txt)"),
    ]


def test_what_is_left_out_by_its_name_is_announced_once_with_a_count_and_names(
    zoo, caplog
):
    for k in range(6):
        write(zoo / "a_first" / f"{k}.heic", b"")
    write(zoo / "b_second" / "Thumbs.db", b"")
    write(zoo / "stray.jpg", JPEG)
    write(zoo / "a_first" / ".DS_Store", b"")  # hidden: not worth a word
    assert len(ImageFolder(zoo, 16)) == 9
    (record,) = caplog.records
    message = record.getMessage()
    assert "8 files are left out" in message and "'stray.jpg' lies beside" in message
    assert (
        "a_first/0.heic' not an image by its name (.heic)" in message
        and "and 5 more" in message
    )
    caplog.clear()
    with pytest.raises(
        ValueError, match=r"no images below.*7 files are left out: .*heic"
    ):
        for path in zoo.rglob("*.*"):
            path.unlink() if path.suffix in (".JPEG", ".jpg") else None
        ImageFolder(zoo, 16)


def test_every_usual_ending_of_a_jpeg_is_one(zoo):
    for name in ("web.jfif", "old.jpe", "LOUD.JPG"):
        write(zoo / "a_first" / name, JPEG)
    image = Image.new("RGB", (8, 8), "red")
    if features.check("avif"):
        write(zoo / "a_first" / "new.avif", encoded(image, "AVIF", quality=100))
    folder = ImageFolder(zoo, 16)
    names = {Path(folder.name(i)).name for i in range(len(folder))}
    assert (
        {"web.jfif", "old.jpe", "LOUD.JPG"} <= names
        and folder.skipped == []
        and scan(folder) == []
    )
    assert ("new.avif" in names) == bool(features.check("avif"))


def test_hidden_folders_and_those_of_mac_archives_are_no_classes(zoo):
    for hidden in (".ipynb_checkpoints", "__MACOSX", ".hidden"):
        write(zoo / hidden / "x.jpg", JPEG)
        write(zoo / "a_first" / hidden / "x.jpg", JPEG)
    for folder in (ImageFolder(zoo, 16), ImageFolder(zoo, 16, conditional=False)):
        assert len(folder) == 9 and folder.skipped == []
    assert ImageFolder(zoo, 16).classes == ("a_first", "b_second", "c_third")


def test_a_pipe_is_not_waited_for(zoo):
    os.mkfifo(zoo / "a_first" / "pipe.png")
    folder = ImageFolder(zoo, 16)
    assert (
        len(folder) == 9
        and folder.skipped[0].reason == "neither a file nor a link to one"
    )


# what tells one folder from another


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_the_place(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "moved")
    folder = ImageFolder(zoo, 16)
    same = {
        f.fingerprint
        for f in (
            folder,
            ImageFolder(tmp_path / "moved", 16),
            ImageFolder(zoo, 32, flip=True),
        )
    }
    assert (
        same == {folder.fingerprint} == {pickle.loads(pickle.dumps(folder)).fingerprint}
    )
    others = [
        ImageFolder(zoo, 16, exif_rotate=True),
        ImageFolder(zoo, 16, background=(0, 0, 0)),
        ImageFolder(zoo, 16, conditional=False),
        folder.without([data.Skipped(folder.path(4), "test")]),
    ]
    prints = [folder.fingerprint, *(other.fingerprint for other in others)]
    os.rename(zoo / "a_first" / "0.JPEG", zoo / "a_first" / "00.JPEG")
    prints.append(ImageFolder(zoo, 16).fingerprint)  # another name
    write(zoo / "a_first" / "00.JPEG", JPEG)
    prints.append(ImageFolder(zoo, 16).fingerprint)  # another size
    os.remove(zoo / "a_first" / "00.JPEG")
    os.symlink("nowhere", zoo / "a_first" / "00.JPEG")
    prints.append(ImageFolder(zoo, 16).fingerprint)  # no file at all
    assert len(set(prints)) == len(prints)


def test_without_a_size_pixels_are_as_they_are(zoo):
    x = ImageFolder(zoo, None)[4][0]
    np.testing.assert_array_equal(
        ((x + 1) * 127.5).round().permute(1, 2, 0), opened(zoo / "b_second" / "1.JPEG")
    )
    assert read_image(zoo / "b_second" / "1.JPEG", None).shape == (3, 30, 40)


@pytest.mark.parametrize(
    "background", [(256, 0, 0), (-1, 0, 0), (0, 0), (0.5, 0, 0), "red"]
)
def test_a_background_that_is_no_colour_is_refused_and_no_image_blamed(zoo, background):
    for attempt in (
        lambda: ImageFolder(zoo, 16, background=background),
        lambda: decode_image(JPEG, background),
    ):
        with pytest.raises(ValueError, match="expected three integers") as caught:
            attempt()
        assert not isinstance(caught.value, BadImage)


# a tree of awkward files, as people have them


def draw_weird(root: Path) -> dict[str, np.ndarray | str | None]:
    """By name: the pixels (H, W, 3), the reason of a refusal, or None where a file is lossy."""
    rng = np.random.default_rng(0)
    truth: dict[str, np.ndarray | str | None] = {}

    def put(name, content, expected=None):
        write(root / name, content)
        truth[name] = expected

    def noise(h=40, w=48):
        return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)

    def rgb(h=40, w=48):
        return Image.fromarray(noise(h, w))

    def exact(name, form="PNG", h=40, w=48, **options):
        x = noise(h, w)
        put(name, encoded(Image.fromarray(x), form, **options), x)

    for name, h, w in (
        ("one_pixel.png", 1, 1),
        ("wide.png", 4, 300),
        ("UPPER.PNG", 40, 48),
    ):
        exact(f"class a/{name}", h=h, w=w)
    for name in ("with space & \n newline.png", "quote'\"$.png", "deep/er/nested.PNG"):
        exact(f"Ünïcode é/{name}")
    exact("class a/apng.png", save_all=True, append_images=[rgb()])
    exact("class a/multi.tiff", "TIFF", save_all=True, append_images=[rgb()])
    exact("class a/really_png.jpg")
    exact("class a/really_bmp.JPEG", "BMP")
    exact("class a/lossless.webp", "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    exact("class a/turned.png", exif=exif)  # as it is stored, the default
    grey = (rng.random((40, 40)) * 256).astype(np.uint8)
    levels = np.repeat(grey[..., None], 3, 2)
    for name, form in (("grey16.png", "PNG"), ("grey16.tif", "TIFF")):
        put(
            f"class a/{name}",
            encoded(Image.fromarray(grey.astype(np.uint16) * 257), form),
            levels,
        )
    put("class a/grey.png", encoded(Image.fromarray(grey), "PNG"), levels)
    put(
        "class a/grey_trns.png",
        encoded(Image.fromarray(grey), "PNG", transparency=7),
        np.where(levels == 7, 255, levels),
    )
    put(
        "class a/bits.png",
        encoded(Image.fromarray(grey > 99), "PNG"),
        np.where(levels > 99, 255, 0).astype(np.uint8),
    )
    x, alpha = noise(), np.full((40, 48), 255, np.uint8)
    alpha[8:24] = 0
    transparent = Image.fromarray(np.dstack([x, alpha]))
    put(
        "class a/rgba.png",
        encoded(transparent, "PNG"),
        np.where(alpha[..., None] == 0, 255, x).astype(np.uint8),
    )
    put(
        "class a/anim.gif",
        encoded(rgb(), "GIF", save_all=True, append_images=[rgb(), rgb()]),
    )
    put("class a/cmyk.jpg", encoded(rgb().convert("CMYK"), "JPEG"))
    put(
        "class a/photo.mpo.jpg",
        encoded(rgb(), "MPO", save_all=True, append_images=[rgb()]),
    )
    put("class a/web.jfif", encoded(rgb(), "JPEG"))
    put("class a/empty.jpg", b"", "empty file")
    put("class a/truncated.jpg", encoded(rgb(200, 200), "JPEG")[:-400], "truncated")
    put(
        "class a/float.tif",
        encoded(Image.fromarray(rng.random((8, 8), np.float32)), "TIFF"),
        "no agreed range",
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * (2 << 20), zip=True)
    put("class a/bigtext.png", encoded(rgb(), "PNG", pnginfo=text), "cannot be decoded")
    os.symlink("nowhere.png", root / "class a" / "dangling.png")
    truth["class a/dangling.png"] = "where no file is"
    os.symlink("..", root / "Ünïcode é" / "loop")
    (root / "empty").mkdir()
    for junk in (
        ".hidden/x.png",
        "__MACOSX/._x.jpg",
        "class a/.DS_Store",
        "class a/._UPPER.PNG",
        "class a/Thumbs.db",
    ):
        write(root / junk, JPEG)
    return truth


def test_a_tree_of_awkward_files_is_read_pixel_by_pixel_or_refused_by_name(tmp_path):
    truth = draw_weird(tmp_path / "weird")
    folder = ImageFolder(tmp_path / "weird", None)
    assert folder.classes == ("class a", "empty", "Ünïcode é")
    assert [Path(path).name for path, _ in folder.skipped] == ["Thumbs.db"]
    assert {folder.name(i) for i in range(len(folder))} == truth.keys()
    refused = {}
    for i in range(len(folder)):
        expected = truth[folder.name(i)]
        if isinstance(expected, str):
            with pytest.raises(BadImage, match=expected):
                folder.read(i)
            refused[folder.path(i)] = expected
        else:
            pixels = ((folder.read(i) + 1) * 127.5).round().permute(1, 2, 0).numpy()
            if expected is not None:
                np.testing.assert_array_equal(pixels, expected, err_msg=folder.name(i))
    assert {path for path, _ in scan(folder)} == refused.keys()
    for i in range(len(folder)):  # and [] steps over them
        assert folder[i][1] == folder.labels[i]
    assert {path for path, _ in folder.skipped[1:]} == refused.keys()


def test_an_empty_class_keeps_its_label(zoo):
    (zoo / "aa_empty").mkdir()
    folder = ImageFolder(zoo, 16)
    assert folder.classes[1] == "aa_empty" and folder.labels.bincount().tolist() == [
        3,
        0,
        3,
        3,
    ]


def test_names_that_are_not_utf8_work(zoo):
    name = os.fsdecode(b"caf\xe9.png")
    write(zoo / "a_first" / name, encoded(noise_image(8, 8), "PNG"))
    folder = ImageFolder(zoo, 8)
    assert any(
        os.path.basename(folder.path(i)) == name and folder[i][0].shape == (3, 8, 8)
        for i in range(len(folder))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_scan_lists_exactly_the_broken_files(zoo, workers):
    for name, (content, _) in BROKEN.items():
        write(zoo / "b_second" / name, content)
    os.symlink(zoo / "nowhere.jpg", zoo / "c_third" / "dangling.jpg")
    folder = ImageFolder(zoo, 16)
    bad = scan(folder, workers)
    assert [Path(s.path).name for s in bad] == [*sorted(BROKEN), "dangling.jpg"]
    assert all(BROKEN[Path(s.path).name][1] in s.reason for s in bad[:-1])
    good = folder.without(bad)
    assert (
        len(good) == 9
        and good.classes == folder.classes
        and good.skipped == bad
        and folder.skipped == []
    )
    assert scan(good) == []


def test_a_bad_image_in_training_is_replaced_by_the_next_of_its_class_and_recorded_once(
    zoo, caplog
):
    write(zoo / "b_second" / "1.JPEG", JPEG[:300])
    write(zoo / "b_second" / "2.JPEG", b"")
    folder = ImageFolder(zoo, 16)
    for _ in range(2):
        for index in (5, 4):
            x, y = folder[index]
            assert y == 1 and torch.equal(
                x, read_image(zoo / "b_second" / "0.JPEG", 16)
            )
    assert sorted(Path(s.path).name for s in folder.skipped) == ["1.JPEG", "2.JPEG"]
    assert len(caplog.records) == 2


def test_a_hundred_broken_images_in_a_row_are_no_accident(tmp_path):
    for k in range(data.PATIENCE + 20):
        write(tmp_path / "folder" / f"{k:03d}.png", b"")
    folder = ImageFolder(tmp_path / "folder", 8, conditional=False)
    with pytest.raises(BadImage, match="none of the 100 images"):
        folder[3]
    assert len(folder.skipped) == 100  # and not one more was tried


def test_threads_that_meet_one_broken_image_together_record_it_once(zoo):
    write(zoo / "b_second" / "1.JPEG", b"")
    folder = ImageFolder(zoo, 16)
    with ThreadPoolExecutor(8) as pool:
        images = [image for image, _ in pool.map(folder.__getitem__, [4] * 64)]
    assert (
        all(torch.equal(image, images[0]) for image in images)
        and len(folder.skipped) == 1
    )


def test_a_class_without_any_good_image_is_an_error(zoo):
    for k in range(3):
        write(zoo / "b_second" / f"{k}.JPEG", b"")
    with pytest.raises(BadImage, match="none of the 3 images"):
        ImageFolder(zoo, 16)[4]


def test_a_link_that_leads_nowhere_and_a_file_that_vanished_are_listed_and_stepped_over(
    zoo, caplog
):
    os.symlink("nowhere.png", zoo / "b_second" / "3.png")
    os.symlink("4.png", zoo / "b_second" / "4.png")  # to itself
    folder = ImageFolder(zoo, 16)
    assert [folder.name(i) for i in range(3, 8)] == [
        f"b_second/{k}" for k in ("0.JPEG", "1.JPEG", "2.JPEG", "3.png", "4.png")
    ]
    os.remove(folder.path(4))
    for index, substitute in ((4, "2.JPEG"), (6, "0.JPEG"), (7, "0.JPEG")):
        x, y = folder[index]
        assert y == 1 and torch.equal(x, read_image(zoo / "b_second" / substitute, 16))
        with pytest.raises(BadImage, match=r"no longer there|where no file is"):
            folder.read(index)
    assert [Path(path).name for path, _ in folder.skipped] == [
        "1.JPEG",
        "3.png",
        "4.png",
    ]
    assert (
        folder.skipped[1].reason == "a link to 'nowhere.png', where no file is"
        and len(caplog.records) == 3
    )


def test_a_disk_that_fails_does_raise_with_the_name_of_the_file(zoo, monkeypatch):
    folder = ImageFolder(zoo, 16)
    os.rename(zoo / "b_second", zoo.parent / "unplugged")
    with pytest.raises(
        FileNotFoundError, match=r"b_second.1\.JPEG"
    ):  # the folder is gone, not the file
        folder[4]

    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *_: Broken())
    for failing in (
        lambda: folder[1],
        lambda: folder.read(1),
        lambda: read_image(folder.path(1), 16),
    ):
        with pytest.raises(OSError, match=r"Input/output error.*a_first.1\.JPEG"):
            failing()
    assert folder.skipped == []


def test_a_folder_can_travel_to_a_worker(zoo):
    folder = ImageFolder(zoo, 16, flip=True)
    copy = pickle.loads(pickle.dumps(folder))
    assert (
        copy.path(5) == folder.path(5)
        and torch.equal(copy[5][0], folder[5][0])
        and copy.flip
    )


def test_images_without_classes(zoo):
    folder = ImageFolder(zoo, 16, conditional=False)
    assert (
        len(folder) == 9
        and folder.num_classes == 0
        and folder.classes == ()
        and folder[8][1] == 0
    )


def test_folders_that_cannot_work_are_refused_with_what_to_do(zoo, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "parent").mkdir()
    os.symlink(zoo, tmp_path / "parent" / "train")
    for path, options, error, message in [
        (tmp_path / "missing", {}, FileNotFoundError, "there is no folder"),
        (
            zoo / "a_first" / "0.JPEG",
            {},
            NotADirectoryError,
            "is a file; expected a folder",
        ),
        (tmp_path / "empty", {}, ValueError, "no sub-folders.*conditional=False"),
        (tmp_path / "empty", {"conditional": False}, ValueError, "no images below"),
        (tmp_path / "hollow", {}, ValueError, "no images below"),
        (zoo / "a_first", {}, ValueError, "no sub-folders.*conditional=False"),
        (tmp_path / "parent", {}, ValueError, "splits and not classes.*parent/train"),
    ]:
        with pytest.raises(error, match=message):
            ImageFolder(path, 16, **options)
    with pytest.raises(ValueError, match="size is 0"):
        ImageFolder(zoo, 0)
    with pytest.raises(ValueError, match="nothing is left"):
        folder = ImageFolder(zoo, 16)
        folder.without([data.Skipped(folder.path(i), "test") for i in range(9)])


# OpenMoji


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return draw_openmoji(tmp_path_factory.mktemp("emoji") / "made" / "openmoji", 32)


def test_openmoji_reads_as_imagenet(emoji):
    train, val = (ImageFolder(emoji / split, 32) for split in ("train", "val"))
    assert (
        train.classes == val.classes == tuple(sorted(data.OPENMOJI_CLASSES))
        and train.num_classes == 14
    )
    assert (
        scan(train) == scan(val) == []
        and min(train.labels.bincount()) >= 20
        and min(val.labels.bincount()) >= 3
    )
    names = [Path(f.path(i)).stem for f in (train, val) for i in range(len(f))]
    assert (
        len(set(names)) == len(names) > 700
    )  # no picture twice, not in two classes and not in two splits
    assert all(
        opened(f.path(i)).shape == (32, 32, 3)
        for f in (train, val)
        for i in range(0, len(f), 50)
    )


def test_openmoji_pictures_are_in_the_middle_and_in_colour(emoji):
    heart = opened(next(emoji.glob("*/hearts/1F49A.png")))  # the green heart
    assert (
        (heart[0] == 255).all()
        and (heart[:, 0] == 255).all()
        and (heart[-1] == 255).all()
        and (heart[:, -1] == 255).all()
    )
    r, g, b = heart[16, 16]
    assert g > r > b and g - b > 60
    for path in emoji.glob("*/*/*.png"):
        ink = np.argwhere((opened(path) < 250).any(-1))
        assert len(ink) and np.abs((ink.min(0) + ink.max(0)) / 2 - 15.5).max() < 8, path


def test_openmoji_is_deterministic_and_names_its_authors(emoji, tmp_path):
    again = draw_openmoji(tmp_path / "again", 32)
    files = sorted(p.relative_to(emoji) for p in emoji.rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(again) for p in again.rglob("*") if p.is_file()
    )
    assert all((emoji / p).read_bytes() == (again / p).read_bytes() for p in files)
    assert "CC BY-SA 4.0" in (emoji / "openmoji.json").read_text()
    assert list(tmp_path.iterdir()) == [again]  # no draft left behind


def test_openmoji_never_overwrites(emoji, tmp_path):
    stamps = {p: p.stat().st_mtime_ns for p in emoji.rglob("*")}
    assert draw_openmoji(emoji, 32) == emoji
    for options in (
        {"size": 64},
        {"size": 32, "background": (0, 0, 0)},
        {"size": 32, "seed": 1},
    ):
        with pytest.raises(FileExistsError, match="not this drawing"):
            draw_openmoji(emoji, **options)
    assert stamps == {p: p.stat().st_mtime_ns for p in emoji.rglob("*")}
    precious = write(tmp_path / "mine" / "thesis.txt", b"years of work")
    with pytest.raises(FileExistsError, match="nothing was written"):
        draw_openmoji(tmp_path / "mine", 32)
    with pytest.raises(FileExistsError, match="nothing was written"):
        draw_openmoji(precious, 32)
    assert precious.read_bytes() == b"years of work" and [
        p.name for p in tmp_path.iterdir()
    ] == ["mine"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_openmoji(tmp_path / "openmoji", 32)
    assert list(tmp_path.iterdir()) == []


def test_openmoji_on_another_background(tmp_path):
    drawn = draw_openmoji(tmp_path / "blue", 16, background=(0, 0, 255))
    assert opened(next(drawn.glob("*/hearts/1F49A.png")))[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="size is 4; expected 8 or more"):
        draw_openmoji(tmp_path / "tiny", 4)
