"""A zip is its folder: same images, order, labels, fingerprint; never unpacked."""

import ntpath
import os
import pickle
import random
import shutil
import struct
import subprocess
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from pictures import BROKEN, JPEG, encoded, noise_image, write
from stores import OPTIONS
from tiny import SELDOM, TINY, changed, run_tiny, write_images

from diffussm.encoding import encode
from diffussm.folders import ImageFolder
from diffussm.formats import find_broken_images, images_from
from diffussm.image_sets import ImageSet
from diffussm.images import BadImage
from diffussm.recipes import open_data
from diffussm.runs import train
from diffussm.zips import ZipFolder, zip_of


def zipped(folder: Path, name: str = "", top: bool = True, method=zipfile.ZIP_DEFLATED):
    """The folder as a zip beside it, with its own name in front of all or without."""
    path = folder.with_name(f"{name or folder.name}.zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):  # in no helpful order
            archive.write(file, file.relative_to(folder.parent if top else folder))
    return path


def assert_same(a: ImageFolder, b: ImageFolder) -> None:
    assert (a.classes, a.num_classes) == (b.classes, b.num_classes)
    assert a.labels.tolist() == b.labels.tolist()
    assert [a.name(i) for i in range(len(a))] == [b.name(i) for i in range(len(b))]
    for i in range(len(a)):
        assert torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1]
    told = [
        [(os.path.relpath(path, s.root), reason) for path, reason in s.skipped]
        for s in (a, b)
    ]
    assert told[0] == told[1] and a.identity == b.identity


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("conditional", [None, True, False])
def test_a_zip_equals_its_folder(zoo, top, method, conditional):
    """Nested, upper-case, broken and strange files, and what systems leave behind."""
    write(zoo / "a_first" / "deep" / "er" / "x.PNG", encoded(noise_image(8, 8), "PNG"))
    for name in ("half.jpg", "text.jpg", "empty.jpg"):
        write(zoo / "b_second" / name, BROKEN[name][0])
    (zoo / "aa_empty").mkdir()
    for junk in ("Thumbs.db", ".DS_Store", "._0.JPEG", "notes.txt", "no_ending"):
        write(zoo / "c_third" / junk, JPEG)
    for junk in ("__MACOSX/a_first/._0.JPEG", ".hidden/x.jpg", "readme.md"):
        write(zoo / junk, JPEG)
    write(zoo / "Ünïcode é" / "name with space & \n newline.png", JPEG)
    folder = images_from(zoo, 16, conditional=conditional, flip=True)
    packed = images_from(zipped(zoo, "z", top, method), 16, conditional=conditional)
    assert isinstance(packed, ZipFolder) and not packed.flip
    assert_same(folder, packed)
    assert len(folder) == 14 and len(folder.skipped) == 7


def test_images_without_classes(zoo):
    flat = zoo / "a_first"
    for top in (True, False):
        packed = images_from(zipped(flat, f"flat{top}", top), 16)
        assert_same(images_from(flat, 16), packed)
        assert packed.num_classes == 0 and len(packed) == 3
    only = ZipFolder(zipped(flat, "only"), 16, conditional=True)  # the one class
    assert only.classes == ("a_first",) and len(only) == 3
    with pytest.raises(ValueError, match="no sub-folders.*conditional=False"):
        ZipFolder(zipped(flat, "none", top=False), 16, conditional=True)


def test_a_folder_in_a_zip_is_named_by_its_path(zoo, tmp_path):
    parent = tmp_path / "both"
    for split in ("train", "val"):
        shutil.copytree(zoo, parent / split)
    (parent / "val" / "a_first" / "0.JPEG").unlink()
    archive = zipped(parent)
    with pytest.raises(ValueError, match=r"both\.zip/both/train is a split and no cla"):
        images_from(archive, 16)
    for split, count in (("train", 9), ("val", 8)):
        packed = images_from(archive / "both" / split, 16)
        assert_same(images_from(parent / split, 16), packed)
        assert len(packed) == count
    assert zip_of(archive / "both" / "val") == archive == zip_of(archive)
    assert zip_of(parent) is None and zip_of("nothing.zip") is None
    with pytest.raises(
        ValueError, match=r"no folder 'test'; it holds both, both/train"
    ):
        images_from(archive / "test", 16)


def test_many_threads_read_one_zip(zoo):
    folder, packed = ImageFolder(zoo, 16), ZipFolder(zipped(zoo), 16)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(packed.__getitem__, list(range(9)) * 60))
    for i, (image, label) in enumerate(found):
        assert torch.equal(image, folder[i % 9][0]) and label == i % 9 // 3


def test_zip_is_read_where_a_system_has_no_pread(zoo, monkeypatch):
    """One place in the file for all threads: they take turns."""
    folder, archive = ImageFolder(zoo, 16), zipped(zoo)
    expected = [folder[i][0] for i in range(9)]
    monkeypatch.delattr(os, "pread")
    sent = pickle.loads(pickle.dumps(ZipFolder(archive, 16)))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(sent.read, list(range(9)) * 60))
    assert all(torch.equal(image, expected[i % 9]) for i, image in enumerate(found))


def test_zip_is_opened_as_bytes_where_systems_have_text(zoo, monkeypatch):
    asked, plain = [], os.open
    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)

    def opening(path, flags, *rest):
        asked.append(flags)
        return plain(path, flags & ~(1 << 30), *rest)

    archive = zipped(zoo)
    monkeypatch.setattr(os, "open", opening)
    ZipFolder(archive, 16)
    assert asked == [os.O_RDONLY | 1 << 30]


def test_zip_is_its_folder_where_paths_have_backslashes(zoo, monkeypatch):
    archive = zipped(zoo)
    whole = ZipFolder(archive, 16)
    expected = [whole[i] for i in range(len(whole))]
    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.setattr(os, "sep", "\\")
    for root in (archive, archive / "zoo"):
        packed = ZipFolder(root, 16)
        assert packed.classes == whole.classes and packed.name(0) == "a_first\\0.JPEG"
        for i, (image, label) in enumerate(expected):
            assert torch.equal(packed[i][0], image) and packed[i][1] == label


def sum_of(images: ZipFolder, i: int) -> float:
    return float(images.read(i).double().sum())


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_read_the_zip_that_they_were_given(zoo, method):
    packed = ZipFolder(zipped(zoo), 16)
    expected = [sum_of(packed, i) for i in range(9)]
    with get_context(method).Pool(3) as pool:
        jobs = [(packed, i % 9) for i in range(45)]
        assert pool.starmap(sum_of, jobs, chunksize=1) == expected * 5
    assert [sum_of(packed, i) for i in range(9)] == expected


def test_a_fork_shares_no_place_in_the_file(zoo):
    """Both read at once, again and again: a shared place would be moved."""
    packed = ZipFolder(zipped(zoo), 16)
    expected = [sum_of(packed, i) for i in range(9)]
    child = os.fork()
    order = range(9) if child else range(8, -1, -1)
    good = all(sum_of(packed, i) == expected[i] for _ in range(10) for i in order)
    if child == 0:
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0 and good


def test_a_zip_that_changed_on_the_way_is_noticed(zoo):
    archive = zipped(zoo)
    packed = ZipFolder(archive, 16, flip=True)
    sent = pickle.dumps(packed)
    arrived = pickle.loads(sent)
    assert arrived.flip and torch.equal(arrived[4][0], packed[4][0])
    assert arrived.fingerprint == packed.fingerprint == ImageFolder(zoo, 16).fingerprint
    write(zoo / "b_second" / "more.jpg", JPEG)
    zipped(zoo)
    with pytest.raises(OSError, match="its size has changed"):
        pickle.loads(sent)


@pytest.mark.slow
def test_known_broken_images_are_taken_out(zoo):
    write(zoo / "b_second" / "1.JPEG", JPEG[:300])
    packed = ZipFolder(zipped(zoo), 16)
    for workers in (0, 2):
        bad = find_broken_images(packed, workers)
        assert [Path(path).name for path, _ in bad] == ["1.JPEG"]
    good = packed.without(bad)
    assert len(good) == 8 and good.classes == packed.classes
    assert find_broken_images(good) == [] and good.fingerprint != packed.fingerprint


def test_what_a_zip_was_made_by_does_not_change_its_names(zoo, tmp_path):
    """Windows' backslashes, macOS's unmarked UTF-8, DOS's code page, './' in front."""
    name = "Ünïcode é/x.JPEG"
    makers = {  # who made it, the bytes of the name, and what it stands for
        "windows": (0, b"a\\b\\x.JPEG", "a/b/x.JPEG"),
        "dos": (0, name.encode("cp437"), name),
        "macos": (3, name.encode(), name),
        "unix": (3, b"caf\xe9.jpg", os.fsdecode(b"caf\xe9.jpg")),
        "dots": (3, b"./a/./x.JPEG", "a/x.JPEG"),
    }
    for maker, (system, written, expected) in makers.items():
        info = zipfile.ZipInfo("?" * len(written))
        info.create_system = system
        with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
            archive.writestr(info, JPEG)
            archive.writestr("z/0.jpg", JPEG)
        content = (tmp_path / "plain.zip").read_bytes()
        path = tmp_path / f"{maker}.zip"
        path.write_bytes(content.replace(b"?" * len(written), written))
        packed = ZipFolder(path, 16, conditional=False)
        assert {packed.name(0), packed.name(1)} == {expected, "z/0.jpg"}, maker
        assert torch.equal(packed[0][0], packed[1][0])


@pytest.mark.skipif(not shutil.which("zip"), reason="Info-ZIP is not installed")
def test_what_zip_makes_and_unzip_unpacks(zoo, tmp_path):
    write(zoo / "Ünïcode é" / "ü.jpg", JPEG)
    os.symlink("0.JPEG", zoo / "a_first" / "link.JPEG")
    made = ["zip", "-q", "-r", "--symlinks", "made.zip", "zoo"]
    subprocess.run(made, cwd=tmp_path, check=True)
    subprocess.run(["unzip", "-q", "made.zip", "-d", "un"], cwd=tmp_path, check=True)
    packed = ZipFolder(tmp_path / "made.zip", 16)
    assert [(Path(path).name, reason) for path, reason in packed.skipped] == [
        ("link.JPEG", "a link, which is not followed in a zip")
    ]
    (tmp_path / "un" / "zoo" / "a_first" / "link.JPEG").unlink()
    packed.skipped.clear()
    assert_same(ImageFolder(tmp_path / "un" / "zoo", 16), packed)
    secret = ["zip", "-q", "-r", "-P", "secret", "secret.zip", "zoo"]
    subprocess.run(secret, cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="is encrypted; unpack it with its password"):
        ZipFolder(tmp_path / "secret.zip", 16)


def test_a_zip_that_cannot_be_read_in_place_is_refused_in_a_sentence(zoo, tmp_path):
    def entries(*names, method=zipfile.ZIP_STORED):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in names:
                archive.writestr(name, JPEG)
        return path

    archive = zipped(zoo)
    content = archive.read_bytes()
    write(tmp_path / "half.zip", content[: len(content) // 2])
    write(tmp_path / "text.zip", b"<html>404</html>")
    write(tmp_path / "nothing.zip", b"")
    for path, error, message in [
        (tmp_path / "half.zip", OSError, "half.zip is no zip, or not a whole one"),
        (tmp_path / "text.zip", OSError, "is no zip, or not a whole one"),
        (tmp_path / "nothing.zip", OSError, "is no zip, or not a whole one"),
        (tmp_path / "missing.zip", FileNotFoundError, "there is no .*missing.zip"),
        (entries("a/x.jpg", "../evil.jpg"), ValueError, "'../evil.jpg' lies outside"),
        (entries("a/../../x.jpg"), ValueError, "'../x.jpg' lies outside of it"),
        (entries("/abs/x.jpg"), ValueError, "'/abs/x.jpg' lies outside of it"),
        (entries("a/" * 200 + "x.jpg"), ValueError, "more than 100 folders deep"),
        (entries("a.jpg", method=zipfile.ZIP_LZMA), ValueError, "by method 14; zip"),
        (entries("l/data.mdb", "l/lock.mdb"), ValueError, "is a database.*unpack it"),
        (entries("d/data-0.arrow"), ValueError, "is a database, mapped into memory"),
        (entries("one.zip", "two.zip"), ValueError, r"one.zip' not an image by its"),
        (entries(), ValueError, "no images below"),
        (entries("__MACOSX/._x.jpg", "a/.x.jpg"), ValueError, "no images below"),
    ]:
        with pytest.raises(error, match=message):
            images_from(path, 16)
    with pytest.raises(ValueError, match="size=0"):
        ZipFolder(archive, 0)


def test_damaged_bytes_are_one_broken_image(zoo):
    """By the checksum, even where the picture would still be decoded."""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = zipped(zoo, method=method)
        with zipfile.ZipFile(archive) as table:
            info = table.getinfo("zoo/b_second/1.JPEG")
        content = bytearray(archive.read_bytes())
        content[info.header_offset + 60 + info.compress_size // 2] ^= 1
        archive.write_bytes(content)
        packed, folder = ZipFolder(archive, 16), ImageFolder(zoo, 16)
        assert torch.equal(packed[4][0], folder[5][0]) and packed[4][1] == 1
        ((path, reason),) = packed.skipped
        assert (
            path == f"{archive}/zoo/b_second/1.JPEG" and "damaged in the zip" in reason
        )
        assert [Path(one.path).name for one in find_broken_images(packed)] == ["1.JPEG"]


def test_a_picture_that_unfolds_beyond_its_size_is_cut_off_there(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(1 << 24))
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\1\2") + 24  # its size in the table
    content[place : place + 4] = struct.pack("<I", 100)
    path.write_bytes(content)
    packed = ZipFolder(path, 16)
    assert packed._size(0) == 100
    tracemalloc.start()
    with pytest.raises(BadImage, match="checksum"):
        packed.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.slow
def test_noise_in_a_zip_is_an_image_a_broken_image_or_one_clear_error(zoo, tmp_path):
    original = zipped(zoo).read_bytes()
    whole = {
        i: x
        for i, x in enumerate(
            map(ZipFolder(zoo.with_suffix(".zip"), 16).read, range(9))
        )
    }
    rng, outcomes = random.Random(0), {"good": 0, "broken": 0, "refused": 0}
    tail = len(original) - original.index(b"PK\1\2")
    for attempt in range(300):
        content = bytearray(original)
        for _ in range(rng.randrange(1, 4)):  # in the table in two of three
            low = len(content) - tail if attempt % 3 else 0
            content[rng.randrange(low, len(content))] = rng.randrange(256)
        path = write(tmp_path / "noise.zip", bytes(content))
        try:
            packed = ZipFolder(path, 16, conditional=False)
            for i in range(len(packed)):
                try:
                    image = packed.read(i)
                except BadImage:
                    outcomes["broken"] += 1
                else:
                    assert any(torch.equal(image, x) for x in whole.values())
                    outcomes["good"] += 1
        except (OSError, ValueError) as error:
            assert "zip" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_the_last_of_two_entries_of_one_name_counts(tmp_path):
    other = encoded(noise_image(40, 30, 5), "JPEG")
    with (
        zipfile.ZipFile(tmp_path / "two.zip", "w") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("x.jpg", JPEG)
        archive.writestr("x.jpg", other)
    packed = ZipFolder(tmp_path / "two.zip", 16)
    write(tmp_path / "un" / "x.jpg", other)
    assert_same(ImageFolder(tmp_path / "un", 16, conditional=False), packed)


def test_no_member_is_ever_unpacked_or_held_open_twice(zoo, tmp_path):
    archive = zipped(zoo)
    before = sorted(tmp_path.rglob("*"))
    held = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    packed = ZipFolder(archive, 16)
    _ = [packed[i] for i in range(9)]
    if held:
        assert len(set(os.listdir("/proc/self/fd")) - held) == 1
        del packed
        assert set(os.listdir("/proc/self/fd")) == held
    assert sorted(tmp_path.rglob("*")) == before


# wherever a folder is accepted


def test_training_goes_on_with_the_zip_of_its_folder(tmp_path):
    """The same pictures under the same names: other data need `other_data`."""
    folder = Path(write_images(tmp_path / "photos", 0))
    model = {"model": replace(TINY.model, num_classes=2, in_channels=3)}
    run_tiny(tmp_path / "run", data=str(folder), steps=2, **model)
    recipe, _ = changed({"data": str(zipped(folder)), "steps": 4, **model})
    images = open_data(recipe)
    assert isinstance(images, ZipFolder)
    state = train(
        recipe, tmp_path / "run", SELDOM, "cpu", progress=False, dataset=images
    )
    run_tiny(tmp_path / "other", data=str(folder), steps=2, **model)
    same = run_tiny(tmp_path / "other", data=str(folder), steps=4, **model)
    for p, q in zip(state.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_latents_of_a_zip_are_those_of_its_folder(root, vae, tmp_path, one_thread):
    shutil.copytree(root, tmp_path / "images")
    packed = images_from(zipped(tmp_path / "images"), 16)
    encode(images_from(root, 16), tmp_path / "a", vae, "test", **OPTIONS)
    encode(packed, tmp_path / "b", vae, "test", **OPTIONS)
    for file in (tmp_path / "a").glob("shard-*"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_a_zip_is_scored_as_its_folder_is(zoo):
    write(zoo / "b_second" / "4.JPEG", b"")
    sets = [
        ImageSet(zoo, 16),
        ImageSet(zipped(zoo), 16),
        ImageSet(zoo.with_suffix(".zip") / "zoo", 16),
    ]
    found = [torch.cat(list(one.batches(4))) for one in sets]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert [len(one.left_out) for one in sets] == [1, 1, 1]
