"""Data sets of others: torchvision's, Hugging Face's, and whatever has an index."""

import builtins
import io
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import diffussm
from pictures import JPEG, encoded, noise_image, write
from PIL import Image
from stores import OPTIONS
from tiny import TINY
from torch.utils.data import Subset
from torchvision import datasets as vision
from torchvision.transforms import ToTensor

from diffussm import adapters
from diffussm.adapters import IndexedImages
from diffussm.encoding import encode
from diffussm.folders import ImageFolder
from diffussm.formats import find_broken_images, images_from
from diffussm.image_sets import ImageSet
from diffussm.images import BadImage
from diffussm.recipes import open_data

hub = pytest.importorskip("datasets")
NAMES = ["a_first", "b_second", "c_third"]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    hub.disable_progress_bars()


def hugging(zoo: Path, image="image", label="label", names=NAMES):
    """The zoo as a data set of Hugging Face's, the classes taken in turn."""
    files = sorted(zoo.glob("*/*.JPEG"), key=lambda file: (file.name, file.parent))
    columns = {
        image: [{"bytes": file.read_bytes(), "path": None} for file in files],
        label: [NAMES.index(file.parent.name) for file in files],
    }
    kinds = {image: hub.Image(), label: hub.ClassLabel(names=names)}
    return hub.Dataset.from_dict(columns, hub.Features(kinds))


@pytest.fixture
def saved(zoo, tmp_path) -> Path:
    hugging(zoo).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(a, b) -> None:
    assert (len(a), a.classes, a.num_classes) == (len(b), b.classes, b.num_classes)
    for i in range(len(a)):
        assert torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1]


def levels(image: torch.Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


# what Hugging Face's package wrote


def test_a_saved_data_set_equals_the_folder_it_was_made_of(zoo, saved):
    folder = ImageFolder(zoo, 16, flip=True)
    images = images_from(saved, 16, flip=True)
    assert isinstance(images, IndexedImages) and images.flip and images.levels == 256
    assert_same(folder, images)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images.path(1) == f"{saved}[3]"  # its place there
    indices, flips = torch.tensor([8, 0, 3]), torch.tensor([True, False, True])
    for a, b in zip(
        folder.batch(indices, flips), images.batch(indices, flips), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keys", [("img", "fine_label"), ("picture", "kind")])
def test_columns_have_usual_names_or_are_named(zoo, keys):
    dataset = hugging(zoo, *keys)
    if keys[0] == "img":
        assert_same(ImageFolder(zoo, 16), IndexedImages(dataset, 16))
        return
    with pytest.raises(ValueError, match=r"an item has \['picture', 'kind'\]; say"):
        IndexedImages(dataset, 16)
    with pytest.raises(ValueError, match=r"image='pictures': did you mean 'picture'"):
        IndexedImages(dataset, 16, image="pictures")
    unlabelled = IndexedImages(dataset, 16, image="picture")
    assert unlabelled.num_classes == 0 and unlabelled.classes == ()
    named = IndexedImages(dataset, 16, image="picture", label="kind")
    assert_same(ImageFolder(zoo, 16), named)


@pytest.mark.parametrize("turned", [False, True])
def test_exif_is_followed_only_when_asked_for(zoo, turned):
    """Hugging Face's own decoder always follows it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in zoo.glob("*/*.JPEG"):
        write(file, encoded(noise_image(40, 30), "JPEG", exif=exif))
    images = IndexedImages(hugging(zoo), None, exif_rotate=turned)
    assert_same(ImageFolder(zoo, None, exif_rotate=turned), images)
    assert images[0][0].shape == ((3, 40, 30) if turned else (3, 30, 40))


def test_a_broken_record_is_replaced_by_the_next_of_its_class(zoo, tmp_path):
    write(zoo / "b_second" / "1.JPEG", JPEG[:300])
    write(zoo / "c_third" / "2.JPEG", b"")
    folder, images = ImageFolder(zoo, 16), IndexedImages(hugging(zoo), 16, root="x")
    assert_same(folder, images)
    assert [path for path, _ in images.skipped] == ["x[4]", "x[8]"]
    assert find_broken_images(images) == images.skipped
    with pytest.raises(BadImage, match="cannot be decoded: "):
        images.read(4)
    nothing = hub.Dataset.from_dict(
        {"image": [None, {"bytes": JPEG, "path": None}], "label": [0, 0]},
        hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["a"])}),
    )
    images = IndexedImages(nothing, 16)
    assert torch.equal(images[0][0], images[1][0])
    assert images.skipped == [("Dataset[0]", "no picture")]


def test_pictures_may_lie_beside_the_table(zoo):
    files = sorted(map(str, zoo.glob("*/*.JPEG")))
    kinds = hub.Features({"image": hub.Image()})
    images = IndexedImages(hub.Dataset.from_dict({"image": files}, kinds), 16)
    assert_same(ImageFolder(zoo, 16, conditional=False), images)
    Path(files[2]).unlink()
    with pytest.raises(BadImage, match="no longer there"):
        images.read(2)


def test_a_format_or_transform_of_the_owner_is_kept(zoo):
    plain = IndexedImages(hugging(zoo), 16)
    dataset = hugging(zoo)
    dataset.set_transform(
        lambda rows: {
            "image": [image.convert("L").convert("RGB") for image in rows["image"]],
            "label": rows["label"],
        }
    )
    grey = IndexedImages(dataset, 16)
    x = grey[0][0]
    assert torch.equal(x[0], x[1]) and not torch.equal(x, plain[0][0])
    assert grey.classes == plain.classes and torch.equal(grey.labels, plain.labels)
    with pytest.raises(TypeError, match=r"^Dataset: a picture is Tensor torch.uint8"):
        IndexedImages(hugging(zoo).with_format("torch"), 16)
    assert_same(plain, IndexedImages(hugging(zoo).with_format("numpy"), 16))


def test_the_identity_is_alike_wherever_the_data_set_lies(zoo, saved, tmp_path):
    images = images_from(saved, 16)
    shutil.copytree(saved, tmp_path / "moved")
    same = [
        images_from(tmp_path / "moved", 32, flip=True),
        IndexedImages(hugging(zoo), 8),
    ]
    assert all(images.identity == one.identity for one in same)
    assert pickle.loads(pickle.dumps(images)).identity == images.identity
    prints = [
        images.fingerprint,
        images_from(saved, 16, conditional=False).fingerprint,
        images_from(saved, 16, exif_rotate=True).fingerprint,
        IndexedImages(hugging(zoo), 16, background=(0, 0, 0)).fingerprint,
    ]
    write(zoo / "b_second" / "1.JPEG", JPEG)
    prints.append(IndexedImages(hugging(zoo), 16).fingerprint)
    write(zoo / "b_second" / "1.JPEG", b"broken")
    prints.append(IndexedImages(hugging(zoo), 16).fingerprint)
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_sees_what_its_documentation_says():
    """Of 200 images 0, 3, 6, 9, 12, 15, ... are looked at, and not 1 and 2."""
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 256, (4, 4, 3), np.uint8), 0) for _ in range(200)]
    known = IndexedImages(items, 4).fingerprint
    swapped = [items[0], items[2], items[1], *items[3:]]
    assert IndexedImages(swapped, 4).fingerprint == known
    for other in (items[::-1], items[:-1], [*items[:-1], (items[-1][0], 1)]):
        assert IndexedImages(other, 4).fingerprint != known
    assert f"of {adapters._LOOKED_AT} images" in IndexedImages.__doc__


def test_splits_and_damaged_folders_are_refused(zoo, saved, tmp_path, monkeypatch):
    dataset = hugging(zoo)
    both = hub.DatasetDict({"train": dataset, "val": dataset})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"holds several splits: name one.*both/train"):
        images_from(tmp_path / "both", 16)
    with pytest.raises(ValueError, match=r"DatasetDict holds several data sets: take"):
        IndexedImages(both, 16)
    assert_same(ImageFolder(zoo, 16), images_from(tmp_path / "both" / "val", 16))
    (table,) = saved.glob("*.arrow")
    content = table.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * 4000):
        table.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read by the package datasets"):
            images_from(saved, 16)
    table.unlink()
    with pytest.raises(ValueError, match="cannot be read by the package datasets"):
        images_from(saved, 16)
    (saved / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read by the package datasets"):
        images_from(saved, 16)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets .*pip install"):
        images_from(saved, 16)


# torchvision's


def test_torchvision_gives_what_it_gives(tmp_path):
    fake = vision.FakeData(size=30, image_size=(3, 20, 24), num_classes=4)
    images = IndexedImages(fake, None, flip=True)
    assert images.classes == ("0", "1", "2", "3") and images.flip
    numbers = [int(images.name(i)) for i in range(30)]
    assert sorted(numbers) == list(range(30))
    for i, number in enumerate(numbers):
        picture, label = fake[number]
        assert np.array_equal(levels(images[i][0]), np.asarray(picture))
        assert images[i][1] == int(label) == images.labels[i]
    assert images.labels.tolist() == sorted(images.labels.tolist())
    cropped = IndexedImages(fake, 16)
    assert cropped[3][0].shape == (3, 16, 16)


def test_threads_do_not_meet_in_a_data_set_that_forgot_them():
    """FakeData sets the seed of the global generator for each item."""
    fake = vision.FakeData(size=16, image_size=(3, 64, 64), num_classes=3)
    images = IndexedImages(fake, None)
    expected = [images.read(i) for i in range(16)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(images.read, list(range(16)) * 8))
    assert all(torch.equal(x, expected[i % 16]) for i, x in enumerate(found))
    assert torch.equal(torch.get_rng_state(), before)


def test_class_names_and_labels_come_without_decoding(zoo, monkeypatch):
    dataset = vision.ImageFolder(str(zoo))
    with monkeypatch.context() as patched:
        read, loader = [], dataset.loader
        patched.setattr(
            dataset, "loader", lambda path: read.append(path) or loader(path)
        )
        images = IndexedImages(dataset, 16)
        assert len(read) <= 2  # to see what an item is
    assert_same(ImageFolder(zoo, 16), images)
    write(zoo / "b_second" / "1.JPEG", JPEG[:300])
    assert_same(ImageFolder(zoo, 16), images)
    assert [path for path, _ in images.skipped] == ["ImageFolder[4]"]
    (zoo / "b_second" / "1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.JPEG"):  # no fault of the picture
        images[4]


def test_labels_that_a_transform_changes_are_the_changed_ones(zoo):
    dataset = vision.ImageFolder(str(zoo), target_transform=lambda y: 2 - y)
    images = IndexedImages(dataset, 16)
    assert [images.name(i) for i in range(9)] == list("678345012")
    part = IndexedImages(Subset(vision.ImageFolder(str(zoo)), [8, 0, 4]), 16)
    assert [part.name(i) for i in range(3)] == list("120") and part.num_classes == 3


def test_a_data_set_with_a_transform_to_tensors_is_refused_at_once():
    fake = vision.FakeData(size=4, transform=ToTensor())
    with pytest.raises(
        TypeError, match=r"^FakeData: a picture is Tensor torch.float32"
    ):
        IndexedImages(fake, 16)


def test_wnids_with_several_names_have_them_all():
    class Synonyms(list):
        classes = [("tench", "Tinca tinca"), ("goldfish",)]  # noqa: RUF012

    picture = noise_image(8, 8)
    images = IndexedImages(Synonyms([(picture, 1), (picture, 0)]), 8)
    assert images.classes == ("tench, Tinca tinca", "goldfish")
    with pytest.raises(ValueError, match="a label is 2, and 2 classes are named"):
        IndexedImages(Synonyms([(picture, 2)]), 8)


# whatever has an index


def forms(rng):
    rgb = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (9, 11), dtype=np.uint8)
    png = encoded(Image.fromarray(rgb), "PNG")
    opened = Image.open(io.BytesIO(png))  # decodes when it is asked for pixels
    yield from ((rgb, rgb), (Image.fromarray(rgb), rgb), (png, rgb), (opened, rgb))
    yield grey, np.repeat(grey[..., None], 3, 2)
    clear = np.dstack([rgb, np.zeros((9, 11), np.uint8)])
    yield clear, np.full((9, 11, 3), 255, np.uint8)  # transparent, on white


def test_every_form_of_a_picture_gives_its_pixels():
    for picture, expected in forms(np.random.default_rng(0)):
        for item in ((picture, 0), [picture, 0], {"image": picture, "label": 0}):
            images = IndexedImages([item], None)
            assert np.array_equal(levels(images[0][0]), expected)
            assert images.num_classes == 1
        alone = IndexedImages([picture], None)
        assert np.array_equal(levels(alone[0][0]), expected)
        assert alone.num_classes == 0 and alone[0][1] == 0


def test_what_is_no_such_data_set_is_refused_in_a_sentence(zoo):
    picture = noise_image(8, 8)
    rows = [{"image": picture, "label": "cat"}]
    for dataset, options, error, message in [
        ([], {}, ValueError, "list holds no images"),
        (iter([picture]), {}, TypeError, "has no length and index: load all of it"),
        ([picture], {"conditional": True}, ValueError, "has no labels: omit condit"),
        ([(picture, -1)], {}, ValueError, "a label is negative, for unknown: condit"),
        (rows, {}, ValueError, "'label', are such as .*cat.*class_encode_column"),
        ([(picture, 0.5)], {}, ValueError, "expected integers from 0"),
        ([(picture, None)], {}, ValueError, "expected integers from 0"),
        ([(picture, 0)], {"label": 2}, ValueError, r"label=2: expected one of 0, 1"),
        ([(torch.zeros(3, 8, 8), 0)], {}, TypeError, "picture is Tensor torch.float"),
        ([(np.zeros((3, 8, 8), np.uint8), 0)], {}, TypeError, r"uint8 \(3, 8, 8\): ex"),
        ([(np.zeros((8, 8, 3)), 0)], {}, TypeError, "picture is ndarray float64"),
        ([("a.jpg", 0)], {}, TypeError, "a picture is str: expected one of Pillow's"),
        ([picture], {"size": 0}, ValueError, "size=0"),
    ]:
        with pytest.raises(error, match=message):
            IndexedImages(dataset, **{"size": 8} | options)
    assert IndexedImages(rows, 8, conditional=False).num_classes == 0


# wherever a folder is accepted


def test_training_encoding_and_scoring_take_a_saved_data_set(
    zoo, saved, tmp_path, vae, one_thread
):
    model = replace(TINY.model, num_classes=3, in_channels=3)
    recipe = replace(TINY, model=model, data=str(saved))
    assert_same(ImageFolder(zoo, 8), open_data(recipe))
    encode(images_from(zoo, 16), tmp_path / "a", vae, "test", **OPTIONS)
    encode(images_from(saved, 16), tmp_path / "b", vae, "test", **OPTIONS)
    for file in (tmp_path / "a").glob("shard-*"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    sets = [torch.cat(list(ImageSet(one, 16).batches())) for one in (zoo, saved)]
    images = IndexedImages(hugging(zoo), 16, conditional=False)
    in_its_order = torch.stack([images.read(i) for i in range(9)])
    assert sorted(sets[0].flatten(1).tolist()) == sorted(sets[1].flatten(1).tolist())
    assert torch.equal(((in_its_order + 1) * 127.5).round().byte(), sets[1])


def test_the_package_is_asked_for_only_where_it_is_needed(zoo, monkeypatch):
    ask = builtins.__import__

    def without(name, *rest):
        assert not name.startswith("datasets"), name
        return ask(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert IndexedImages(vision.ImageFolder(str(zoo)), 8).num_classes == 3
    assert images_from(zoo, 8).num_classes == 3


@pytest.mark.slow
def test_commands_take_zips_and_saved_data_sets(zoo, saved, tmp_path):
    shutil.make_archive(str(tmp_path / "zoo"), "zip", tmp_path, "zoo")
    (tmp_path / "tiny.yaml").write_text(
        "model: {input_size: 8, in_channels: 3, num_classes: 3, d_model: 16, "
        "n_blocks: 1, d_state: 4}\nsteps: 2\nbatch_size: 4\n"
    )
    for k, data in enumerate(("zoo.zip", "saved")):
        names = {"t": tmp_path, "d": tmp_path / data, "k": k}
        diffussm("vae {d} {t}/vae{k} --size 16 --steps 1 --batch_size 2", **names)
        words = "encode {d} {t}/store{k} --vae {t}/vae{k} --size 16 --device cpu"
        assert "9 images in 3 classes" in diffussm(words, **names)
        words = "train {t}/tiny.yaml --data {d} --out {t}/run{k} --device cpu --no_grid"
        assert "2 steps done" in diffussm(words, **names)
