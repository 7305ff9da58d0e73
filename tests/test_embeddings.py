"""Ch. "Embeddings": what a denoiser is told, and the image as a stream."""

import math

import numpy as np
import pytest
import torch

from diffussm.embeddings import (
    as_labels,
    sincos_positions,
    timestep_features,
    to_image,
    to_stream,
)


def test_sincos_positions_are_sines_and_cosines_of_column_and_row():
    places = sincos_positions(3, 4, 8)
    for row in range(3):
        for column in range(4):
            expected = [
                f(w * place)
                for place in (column, row)
                for f in (math.sin, math.cos)
                for w in (1, 0.01)
            ]
            torch.testing.assert_close(places[4 * row + column], torch.tensor(expected))


def dit_positions(side, width):
    """The fixed table of DiT's models.py, by its definition.

    The first half of the numbers belongs to the first of the grids that
    `np.meshgrid(across, down)` returns, and that one counts columns.
    """
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    halves = []
    for grid in np.meshgrid(np.arange(side), np.arange(side)):
        angle = np.outer(grid.reshape(-1), omega)
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1))


@pytest.mark.parametrize(("side", "width"), [(2, 4), (16, 64), (64, 1152)])
def test_sincos_positions_are_dits_table_entry_by_entry(side, width):
    ours = sincos_positions(side, side, width)
    torch.testing.assert_close(
        ours.double(), dit_positions(side, width), rtol=0, atol=1e-5
    )


def test_timestep_features_are_cosines_then_sines():
    features = timestep_features(torch.tensor([0, 7, 999]))
    assert features.shape == (3, 256) and features.dtype == torch.float32
    for row, t in zip(features, (0, 7, 999), strict=True):
        angles = [t * 10_000 ** (-i / 128) for i in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=2e-4)


def test_a_group_holds_its_neighbours_channel_by_channel():
    """Place k of group j is position jM + k, in raster order of patches."""
    P, M, (B, C, H, W) = 2, 3, (2, 3, 4, 6)
    x = torch.randn(B, C, H, W)
    stream = to_stream(x, P, M)
    assert stream.shape == (B, H * W // (P * P * M), M * P * P * C)
    for j, k, c, p, q in ((0, 0, 0, 0, 0), (1, 2, 2, 1, 0), (1, 0, 1, 1, 1)):
        row, column = divmod(j * M + k, W // P)
        number = ((k * C + c) * P + p) * P + q
        pixel = x[:, c, row * P + p, column * P + q]
        assert torch.equal(stream[:, j, number], pixel)


@pytest.mark.parametrize(("P", "M"), [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_an_image_survives_the_stream(P, M):
    x = torch.randn(2, 5, 6, 12)
    assert torch.equal(to_image(to_stream(x, P, M), P, M, 12), x)
    empty = torch.zeros(0, 5, 6, 12)
    assert to_image(to_stream(empty, P, M), P, M, 12).shape == empty.shape


@pytest.mark.parametrize(
    "y", [[3, 0], (3, 0), np.array([3, 0], np.uint8), torch.tensor([3, 0]).short()]
)
def test_labels_come_in_any_form(y):
    assert as_labels(y).dtype == torch.int64 and as_labels(y).tolist() == [3, 0]


@pytest.mark.parametrize(
    "y", [[0.5], np.array([1.0]), torch.tensor([1.0]), torch.tensor([True]), ["cat"]]
)
def test_labels_that_are_no_integers_are_refused(y):
    with pytest.raises(TypeError, match="expected an integer tensor, array or list"):
        as_labels(y)
