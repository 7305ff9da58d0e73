"""What comes in LSUN's form, whatever lies there, and looking inside."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import BROKEN, JPEG, encoded, write, write_lsun
from PIL import Image, PngImagePlugin
from stores import SIZE, draw_images

from diffussm import folders
from diffussm.folders import ImageFolder
from diffussm.formats import LmdbImages, find_broken_images, images_from
from diffussm.images import BadImage


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def lsun(root, tmp_path_factory) -> Path:
    return write_lsun(root, tmp_path_factory.mktemp("lsun") / "church_train_lmdb")


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


# looking inside


def draw_weird(root: Path) -> dict[str, np.ndarray | str | None]:
    """By name: pixels (H, W, 3), the reason of a refusal, or None: a lossy file."""
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
    assert {path for path, _ in find_broken_images(folder)} == refused.keys()
    for i in range(len(folder)):  # and [] steps over them
        assert folder[i][1] == folder.labels[i]
    assert {path for path, _ in folder.skipped[1:]} == refused.keys()


def test_a_disk_that_fails_is_no_broken_image(root, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    folder = ImageFolder(root, SIZE)
    monkeypatch.setattr(folders, "listed_content", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*png"):
        find_broken_images(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_find_broken_images_lists_exactly_the_broken_files(zoo, workers):
    for name, (content, _) in BROKEN.items():
        write(zoo / "b_second" / name, content)
    os.symlink(zoo / "nowhere.jpg", zoo / "c_third" / "dangling.jpg")
    folder = ImageFolder(zoo, 16)
    bad = find_broken_images(folder, workers)
    assert [Path(s.path).name for s in bad] == [*sorted(BROKEN), "dangling.jpg"]
    assert all(BROKEN[Path(s.path).name][1] in s.reason for s in bad[:-1])
    good = folder.without(bad)
    assert (
        len(good) == 9
        and good.classes == folder.classes
        and good.skipped == bad
        and folder.skipped == []
    )
    assert find_broken_images(good) == []
