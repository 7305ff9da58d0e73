"""The order of samples, flips, digits, tensors, and random numbers."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from diffussm.data import (
    Dataset,
    TensorData,
    batch_flips,
    batch_indices,
    digits,
    generator,
    random_bits,
    sample_order,
    stratified_split,
)

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


def test_order_is_the_same_in_another_process_and_touches_no_global_generator():
    code = (
        "from diffussm.data import batch_flips, batch_indices;"
        "where = (50, 20, 7, 3);"
        "print(batch_indices(*where).tolist(), batch_flips(*where).int().tolist())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    torch.manual_seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    where = (50, 20, 7, 3)
    here = (batch_indices(*where).tolist(), batch_flips(*where).int().tolist())
    assert other == f"{here[0]} {here[1]}\n"
    assert (
        torch.equal(torch.get_rng_state(), before)
        and (np.random.get_state()[1] == before_numpy).all()
    )


# of (0, "noise", 17), worked out with the plain integers of the test below
GOLDEN_BITS = 0xB8EF422D97F05F90


def test_random_bits_are_splitmix64():
    """Plain integers against the arrays, and the published first outputs."""
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
    # what a run of weeks stands on must not move with a version of anything
    assert int(random_bits(0, "noise", 17)) == GOLDEN_BITS
    assert generator(0, "noise", 17).initial_seed() == GOLDEN_BITS


def test_every_seed_purpose_and_number_has_draws_of_its_own():
    # sampling once started its batches from the noise of the first training steps
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
        ((10, 0, 0, 0), "batch_size=0"),
        ((0, 1, 0, 0), "data set has 0 images"),
        ((10, 2, -1, 0), "step=-1"),
        ((10, 2, 0, -3), "seed=-3"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)


def test_a_step_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match=r"step=1\.5"):
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
    x, y = dataset.batch(indices, flips)
    assert torch.equal(y, indices)
    for k, i in enumerate(indices.tolist()):
        plain = dataset.images[i]
        assert torch.equal(x[k], plain[..., [3, 2, 1, 0]] if flips[k] else plain)
    x[flips] = x[flips].flip(-1)
    assert torch.equal(x, dataset.batch(indices)[0])


def test_flips_are_ignored_where_the_data_set_forbids_them():
    dataset, indices = asymmetric(10, False), torch.arange(10)
    assert torch.equal(
        dataset.batch(indices, torch.ones(10, dtype=torch.bool))[0], dataset.images
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
            r"images.max\(\)=1\.0.*: expected a finite number of at most 1",
        ),
        (torch.tensor(float("nan")).expand(2, 1, 8, 8), None, ValueError, "nan"),
        (torch.zeros(2, 8, 8), None, ValueError, "expected .n, C, H, W."),
        (torch.zeros(0, 1, 8, 8), None, ValueError, "number of images=0"),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            "one per image",
        ),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), TypeError, "label=0.0: expected"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]), ValueError, "label=-1"),
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
    with pytest.raises(ValueError, match="'valid'.*train, test, all"):
        digits("valid")
    for share in (0, 1, -0.1, 20):
        with pytest.raises(ValueError, match=r"above 0 and below 1"):
            stratified_split(torch.zeros(10, dtype=torch.int64), share)


def test_what_images_these_are_is_alike_on_every_machine():
    images, labels = torch.rand(4, 1, 2, 2), torch.arange(4)
    data = TensorData(images, labels, classes="abcd")
    assert data.identity == {
        "images": 4,
        "classes": ["a", "b", "c", "d"],
        "fingerprint": data.fingerprint,
    }
    assert json.loads(json.dumps(data.identity)) == data.identity
    assert TensorData(images.clone(), labels, classes="abcd").identity == data.identity
    assert TensorData(images, labels.flip(0)).fingerprint != data.fingerprint


def test_a_data_set_of_ones_own_has_batches_and_says_what_it_is():
    class Squares(Dataset):
        classes, num_classes, flip, levels = (), 0, False, None

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.full((1, 2, 2), index**2 / 25), 0

    x, y = Squares().batch(torch.tensor([3, 1]))
    assert x[:, 0, 0, 0].tolist() == pytest.approx([9 / 25, 1 / 25])
    assert y.tolist() == [0, 0]
    nothing = {"images": 5, "classes": [], "fingerprint": None}
    assert Squares().identity == nothing
    with pytest.raises(ValueError, match="flips has shape"):
        Squares().batch(torch.tensor([3, 1]), torch.zeros(3, dtype=torch.bool))
