"""Copies are found, and what is as new as held-out images is not called one."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.neighbours import (
    Pairs,
    find_copies,
    nearer_than_held_out,
    nearest_pairs,
    save_sheet,
)
from diffussm.plain_scores import named_features

PIXELS = named_features("pixels")


def pictures(n, seed=0, size=8):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), generator=draw, dtype=torch.uint8)


def test_the_nearest_is_that_of_all_pairs_one_by_one():
    images, known = pictures(5), pictures(23, 1)
    found = nearest_pairs(images, known.split(7), PIXELS)
    x, y = (z.double().flatten(1) / 127.5 - 1 for z in (images, known))
    for i in range(5):
        all_of_them = ((x[i] - y) ** 2).mean(1).sqrt()
        assert float(found.distance[i]) == pytest.approx(float(all_of_them.min()))
        assert torch.equal(found.nearest[i], known[all_of_them.argmin()])


def test_a_copy_has_distance_zero_whatever_the_batches():
    known = pictures(60)
    for size in (1, 7, 60):
        found = nearest_pairs(known[[3, 50]], known.split(size), PIXELS)
        assert found.distance.tolist() == [0, 0]
        assert torch.equal(found.nearest, known[[3, 50]])


def test_mirrored_copies_are_found_if_asked_for():
    known = pictures(9)
    image = known[4:5].flip(-1)
    assert nearest_pairs(image, [known], PIXELS).distance > 0
    found = nearest_pairs(image, [known], PIXELS, mirrored=True)
    assert found.distance == 0 and torch.equal(found.nearest, image)


def test_photographs_are_turned_if_the_run_turned_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (photograph,) = pictures(1)
    picture = Image.fromarray(photograph.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "photograph.png", exif=exif)
    copy, other = [photograph.flip(1, 2)[None]], [pictures(1, 1)]
    for turned in (False, True):
        found, _, _ = find_copies(copy, tmp_path, other, exif_rotate=turned)
        assert (found.distance == 0) == turned


def test_an_unfinished_set_is_refused(tmp_path):
    (tmp_path / "samples.json").write_text('{"complete": false}')
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    with pytest.raises(ValueError, match="not complete"):
        find_copies(tmp_path, [pictures(3)], [pictures(3, 1)])


def test_other_sizes_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="--size"):
        nearest_pairs(pictures(2), [pictures(2, size=16)], PIXELS)


def pairs(distances):
    x = pictures(len(distances))
    return Pairs(x, x, torch.tensor(distances))


def test_the_share_of_new_images_is_about_that_of_held_out_ones():
    held_out = pairs([i / 100 for i in range(1, 101)])
    assert nearer_than_held_out(pairs([0.5, 0.6]), held_out) == 0
    assert nearer_than_held_out(pairs([0.001, 0.6]), held_out) == 0.5
    assert nearer_than_held_out(held_out, held_out) == pytest.approx(0.01)


def test_copies_among_samples_are_counted():
    train, held_out, new = pictures(40), pictures(30, 1), pictures(30, 2)
    mixed = torch.cat([new[:20], train[:10]])
    sources = [train], [held_out]
    samples, others, told = find_copies([mixed], *sources)
    assert told["nearer_than_held_out"] == pytest.approx(1 / 3)
    assert told["images"] == 30 == len(samples.images) == len(others.images)
    assert told["samples"]["least"] == 0 < told["held_out"]["least"]
    assert find_copies([new], *sources)[2]["nearer_than_held_out"] <= 0.1


def test_which_images_are_taken_does_not_depend_on_their_order():
    train, held_out, samples = pictures(9), pictures(12, 1), pictures(12, 2)
    found = [
        find_copies([x], [train], [held_out], count=5)[0].distance.sort().values
        for x in (samples, samples.flip(0))
    ]
    assert len(found[0]) == 5 and torch.equal(*found)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="number of images in batches"):
        find_copies([pictures(0)], [pictures(3)], [pictures(3)])


def test_the_sheet_has_the_nearest_pairs_first(tmp_path):
    left = Pairs(pictures(4), pictures(4, 1), torch.tensor([0.4, 0.1, 0.3, 0.2]))
    right = Pairs(pictures(4, 2), pictures(4, 3), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    save_sheet(left, right, tmp_path / "sheet.png", rows=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    cell = sheet.shape[0] // 2  # five columns, and on their left the numbers
    grid = sheet[:, -5 * cell :]

    def at(row, column):
        middle = row * cell + cell // 2, column * cell + cell // 2
        return grid[middle].tolist()

    def centre(image):
        return image[:, 4, 4].tolist()

    assert at(0, 0) == centre(left.images[1]) and at(0, 1) == centre(left.nearest[1])
    assert at(1, 0) == centre(left.images[3]) and at(0, 2) == [255, 255, 255]
    assert at(0, 3) == centre(right.images[3]) and at(1, 4) == centre(right.nearest[2])
