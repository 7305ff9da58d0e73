"""Folders: labels, names, what is left out, and what happens to broken files."""

import errno
import io
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import JPEG, encoded, noise_image, opened, write
from PIL import Image, features

from diffussm.folders import PATIENCE, ImageFolder, Skipped
from diffussm.images import BadImage, center_crop, decode_image, read_image

# folders


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
    avif = "avif" in features.modules and features.check("avif")  # Pillow 11.3
    if avif:
        write(zoo / "a_first" / "new.avif", encoded(image, "AVIF", quality=100))
    folder = ImageFolder(zoo, 16)
    names = {Path(folder.name(i)).name for i in range(len(folder))}
    assert {"web.jfif", "old.jpe", "LOUD.JPG"} <= names and folder.skipped == []
    assert all(folder.read(i).shape == (3, 16, 16) for i in range(len(folder)))
    assert ("new.avif" in names) == bool(avif)


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
        folder.without([Skipped(folder.path(4), "test")]),
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
    for k in range(PATIENCE + 20):
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
        (tmp_path / "missing", {}, FileNotFoundError, "expected a folder"),
        (zoo / "a_first" / "0.JPEG", {}, NotADirectoryError, "0.JPEG"),
        (tmp_path / "empty", {}, ValueError, "no sub-folders.*conditional=False"),
        (tmp_path / "empty", {"conditional": False}, ValueError, "no images below"),
        (tmp_path / "hollow", {}, ValueError, "no images below"),
        (zoo / "a_first", {}, ValueError, "no sub-folders.*conditional=False"),
        (tmp_path / "parent", {}, ValueError, "parent/train is a split and no class"),
    ]:
        with pytest.raises(error, match=message):
            ImageFolder(path, 16, **options)
    with pytest.raises(ValueError, match="size=0: expected"):
        ImageFolder(zoo, 0)
    with pytest.raises(ValueError, match="would be taken out"):
        folder = ImageFolder(zoo, 16)
        folder.without([Skipped(folder.path(i), "test") for i in range(9)])
