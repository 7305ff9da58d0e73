"""What is scored is what training sees, and in an order of its own."""

import numpy as np
import pytest
import torch
from PIL import Image
from scored import batches, odd_images, some

from diffussm.image_sets import FirstByKey, ImageSet, digests_of, keys_of, read_images
from diffussm.images import read_image


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_scoring_sees_the_pixels_that_training_sees(tmp_path, exif_rotate):
    files = odd_images(tmp_path / "set")
    seen = torch.cat(list(read_images(tmp_path / "set", 2, exif_rotate=exif_rotate)))
    training = torch.stack(
        [read_image(path, 16, exif_rotate=exif_rotate) for path in files]
    )
    assert len(seen) == len(files) == 5
    torch.testing.assert_close(seen / 127.5 - 1, training, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.asfortranarray(some(4)), "Fortran order: store np.ascontiguousarray"),
        (some(4).astype(np.float32), "holds float32, expected uint8"),
        (some(4)[..., :2], "shape .4, 4, 4, 2., expected .n, H, W, 3."),
    ],
)
def test_an_npz_that_is_refused_is_told_why(tmp_path, array, says):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError, match=says):
        list(read_images(tmp_path / "a.npz"))


def test_a_set_has_one_checksum_and_one_order_whatever_its_files_are(tmp_path):
    images = some(20)
    for name, places in (("a", range(20)), ("b", range(19, -1, -1))):
        (tmp_path / name).mkdir()
        for place, image in zip(places, images, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{place:02d}.png")
    np.savez(tmp_path / "c.npz", images)
    found = []
    for source in (tmp_path / "a", tmp_path / "b", tmp_path / "c.npz", batches(images)):
        way = ImageSet(source)
        read = torch.cat(list(way.batches(7)))
        digests = digests_of(read)
        order = np.argsort(keys_of(digests))
        record = way.record(digests, (4, 4))
        found.append((record["images_sha256"], read[order.tolist()].tolist()))
    assert all(one == found[0] for one in found)
    assert read[order.tolist()].tolist() != read.tolist()


@pytest.mark.parametrize("most", [1, 5, 40, None])
def test_the_first_by_key_are_kept_however_they_come(most):
    rng = np.random.default_rng(0)
    keys = rng.permutation(40).astype(np.uint64)
    x = torch.arange(40.0)
    kept = FirstByKey(most)
    for part in np.array_split(np.arange(40), 9):
        kept.add(keys[part], {"pool": x[part.tolist()]})
    found, features = kept.read()
    assert found.tolist() == sorted(keys.tolist())[:most]
    assert features["pool"].tolist() == np.argsort(keys)[:most].tolist()
