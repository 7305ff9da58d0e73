"""ADM's crop, odd files that are converted, and odd files that are refused."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import BROKEN, JPEG, encoded, noise_image, write
from PIL import Image

from diffussm.images import BadImage, center_crop, decode_image, read_image

# the crop


def resize_matrix(n_in, n_out, kernel, radius):
    """How much of each input pixel goes into each output pixel.

    Halving 4k + 1 pixels leaves the middle one exactly between two boxes.
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
    with pytest.raises(ValueError, match="size=0: expected an integer of at least 1"):
        center_crop(noise_image(8, 8), 0)


# odd files that are converted


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    decoded = np.asarray(decode_image(encoded(Image.fromarray(levels), "PNG")))
    expected = np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2)
    np.testing.assert_array_equal(decoded, expected)
    grey = b"P5 16 16 65535\n" + levels.astype(">u2").tobytes()  # PGM
    for turned in (False, True):
        decoded = np.asarray(decode_image(grey, exif_rotate=turned))
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("exif_rotate", [False, True])
def test_sixteen_bit_grey_that_counts_from_white_is_inverted(compression, exif_rotate):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    rising = np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2)
    for white, expected in ((0, 255 - rising), (1, rising)):
        how = {"tiffinfo": {262: white}, "compression": compression}
        content = encoded(Image.fromarray(levels), "TIFF", **how)
        with Image.open(io.BytesIO(content)) as opened:
            for source in (content, opened, opened):  # what was opened stays as it is
                decoded = decode_image(source, exif_rotate=exif_rotate)
                np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_sixteen_bit_grey_keeps_its_transparent_level():
    """That level alone, and not others that become the same eight bits."""
    levels = np.array([[5140, 5141, 0, 65535]], np.uint16)
    content = encoded(Image.fromarray(levels), "PNG", transparency=5140)
    for turned in (False, True):
        decoded = np.asarray(decode_image(content, (1, 2, 3), exif_rotate=turned))
        assert decoded[0].tolist() == [[1, 2, 3], [20] * 3, [0] * 3, [255] * 3]


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


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_reason(name):
    content, reason = BROKEN[name]
    with pytest.raises(BadImage, match=reason):
        decode_image(content)


def test_thirty_two_bits_are_refused_whatever_their_levels():
    levels = np.arange(256, dtype=np.int32).reshape(16, 16)
    for image in (levels, levels * 100):
        with pytest.raises(BadImage, match="mode I has no agreed range"):
            decode_image(encoded(Image.fromarray(image), "TIFF"))


def test_twelve_bits_are_refused_in_grey():
    """As Pillow reads them: 0 to 4095, in what it calls 16 bits."""
    content = encoded(Image.new("I;16", (8, 8), 4095), "TIFF")
    tag = struct.pack("<HHLL", 258, 3, 1, 16)  # bits for each pixel
    assert content.count(tag) == 1
    content = content.replace(tag, struct.pack("<HHLL", 258, 3, 1, 12))
    with pytest.raises(BadImage, match="grey of 12 bits has no agreed range"):
        decode_image(content)


def test_a_transparent_colour_of_sixteen_bits_is_refused():
    """Pillow keeps eight bits of each pixel, and does not find the colour."""
    content = encoded(noise_image(8, 8), "PNG", transparency=(4660, 4660, 4660))
    with pytest.raises(BadImage, match="transparent colour .4660.* has 16 bits"):
        decode_image(content)
    low = encoded(Image.new("RGB", (8, 8), "red"), "PNG", transparency=(255, 0, 0))
    assert decode_image(low).getpixel((4, 4)) == (255, 255, 255)


THREADS = """
import threading, warnings
from io import BytesIO
from PIL import Image
from diffussm import images

file = BytesIO()
Image.new("RGB", (12, 12)).save(file, format="PNG")
Image.MAX_IMAGE_PIXELS, honest = 100, images._loaded
begun, second = [], threading.Event()

def loaded(data):
    begun.append(threading.current_thread())
    if len(begun) == 1:  # the first to begin is the first to end
        second.wait(60)
    else:
        second.set()
        begun[0].join(60)
    return honest(data)

images._loaded = loaded
with warnings.catch_warnings(record=True) as seen:
    both = [
        threading.Thread(target=images.decode_image, args=(file.getvalue(),))
        for _ in range(2)
    ]
    [thread.start() for thread in both]
    [thread.join() for thread in both]
    warnings.warn("later")
print([str(one.message) for one in seen])
"""


def test_pillow_is_muted_in_threads_and_nobody_else():
    end = subprocess.run([sys.executable, "-c", THREADS], capture_output=True)
    assert end.stdout.decode().strip() == "['later']", end.stderr.decode()


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
