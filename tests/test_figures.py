"""Figures in the dark and on phones: what the page writer makes of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tools.book import ROOT

sys.path[:0] = [str(ROOT / "book"), str(ROOT / "book" / "_ext")]

import figures  # noqa: E402
import sheets  # noqa: E402

import plotting  # noqa: E402
from diffussm import pictures  # noqa: E402

SMALLEST = 7  # pixels, on a page 390 pixels wide, of which a figure has 335


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(fig: Figure) -> dict[str, str]:
    """The files that the site has of a figure."""
    return figures.drawings(plotting._svg(fig))


def smallest(svg: str) -> float:
    """The height of the smallest text on a phone."""
    return 335 * float(figures.measures(svg)["data-smallest-text"])


def test_three_panels_of_a_row_stand_one_under_another() -> None:
    fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
    axes[0].set_ylabel("value")
    assert plotting.narrow(fig)
    fig.draw_without_rendering()
    boxes = [ax.get_position() for ax in axes]
    assert boxes[0].y0 > boxes[1].y1 and boxes[1].y0 > boxes[2].y1
    assert len({round(box.x0, 3) for box in boxes}) == 1
    for ax in axes:  # what the first panel said for all
        assert ax.get_ylabel() == "value"
        assert any(label.get_visible() for label in ax.get_yticklabels())
    assert fig.get_figwidth() == plotting.PHONE


def test_twins_and_colour_bars_move_with_their_axes() -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    twin = left.twinx()
    bar = fig.colorbar(right.imshow(np.eye(3)), ax=right).ax
    plotting.narrow(fig)
    fig.draw_without_rendering()
    assert twin.get_position().bounds == left.get_position().bounds
    assert left.get_position().y0 > right.get_position().y1
    assert bar.get_position().x0 > right.get_position().x1
    assert bar.get_position().y0 < right.get_position().y1


def test_two_rows_of_three_become_two_columns() -> None:
    fig, axes = plt.subplots(2, 3, figsize=(9, 4))
    plotting.narrow(fig)
    fig.draw_without_rendering()
    tops = [[round(ax.get_position().y1, 2) for ax in row] for row in axes]
    assert tops[0] == tops[1] == sorted(tops[0], reverse=True)


def test_a_legend_that_is_too_wide_stands_above_in_fewer_columns() -> None:
    fig, ax = plt.subplots(figsize=(9, 3))
    for name in "abcde":
        ax.plot([1, 2], label=f"a rather long name, {name}")
    ax.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    plotting.narrow(fig)
    fig.draw_without_rendering()
    assert ax.get_legend() is None
    box = fig.legends[0].get_window_extent()
    assert box.width <= fig.bbox.width
    assert box.y0 >= ax.get_window_extent().y1


def test_a_small_figure_has_no_second_drawing() -> None:
    fig, _ = plt.subplots(figsize=(plotting.PHONE, 3))
    assert set(drawn(fig)) == {"", "-dark"}


def test_no_second_drawing_where_lab_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    fig, _ = plt.subplots(figsize=(9, 3))
    assert set(drawn(fig)) == {"", "-dark"}
    assert fig.get_figwidth() == 9


def test_text_of_narrow_drawings_is_readable() -> None:
    fig, axes = plt.subplots(1, 3, figsize=(10, 3))
    for ax in axes:
        ax.loglog([1, 1e3], [1, 1e6])  # exponents are the smallest text
    files = drawn(fig)
    assert smallest(files[""]) < SMALLEST <= smallest(files["-narrow"])


def test_smallest_text_is_what_matplotlib_was_told() -> None:
    fig, ax = plt.subplots(figsize=(5, 2))
    ax.set_axis_off()
    ax.text(0.5, 0.5, "large", fontsize=20)
    ax.text(0.1, 0.5, "a line of text", fontsize=6)
    svg = plotting._drawn(fig)
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    measured = float(figures.measures(svg)["data-smallest-text"]) * width
    assert measured == pytest.approx(6, rel=1e-2)


def test_the_dark_drawing_keeps_rasters_and_what_lies_on_them() -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(6, 3))
    left.imshow(np.eye(4), cmap="viridis")
    left.text(1, 1, "on the picture", color="#123456")
    right.plot([0, 1], color="black")
    right.text(0.5, 0.5, "beside", color="#123456")
    files = drawn(fig)
    rasters = re.compile(r"data:image/png;base64,[^\"]*")
    assert rasters.findall(files[""]) == rasters.findall(files["-dark"]) != []
    light, dark = files[""].count("#123456"), files["-dark"].count("#123456")
    assert light == 2 * dark > 0
    assert "stroke: #000000" in files[""] and "stroke: #000000" not in files["-dark"]
    assert figures.dark("#000000") == figures.INK


def test_a_line_without_data_is_drawn_in_silence(
    recwarn: pytest.WarningsRecorder,
) -> None:
    fig, ax = plt.subplots()
    ax.plot([np.nan, np.nan], [0, 1])
    ax.plot([], [])
    ax.text(0, 0, "text")
    drawn(fig)
    assert [str(warning.message) for warning in recwarn] == []


def test_the_ground_of_both_drawings_is_the_page() -> None:
    fig, _ = plt.subplots(figsize=(3, 2))
    assert "fill: #ffffff" in plotting._drawn(fig)  # as Lab shows it
    for svg in drawn(fig).values():
        assert "#ffffff" not in svg and figures.PAGE not in svg


@pytest.mark.parametrize("colour", [*plotting.COLORS.values(), "#07b", "#440154"])
def test_every_colour_can_be_seen_in_the_dark(colour: str) -> None:
    assert figures.contrast(figures.dark(colour), figures.PAGE) >= 4


def test_greys_run_from_the_ink_to_the_page() -> None:
    greys = ["#000000", "#666666", "#cccccc", "#ffffff"]
    seen = [figures.contrast(figures.dark(grey), figures.PAGE) for grey in greys]
    assert seen == sorted(seen, reverse=True) and seen[-1] == 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "book" / "figures").glob("*.svg")), ids=lambda p: p.stem
)
def test_text_of_diagrams_is_readable(path: Path) -> None:
    assert smallest(path.read_text(encoding="utf-8")) >= SMALLEST


def test_players_of_drawings_learn_the_dark_colours() -> None:
    frames = []
    for k in range(2):
        fig = Figure(figsize=(3, 2))
        fig.subplots().plot([0, k], color="#0072B2")
        frames.append(fig)
    player = plotting.frame_player(frames, ["a", "b"], alt="A line.").data
    assert "<svg" in player and "image/svg+xml" in player
    told = figures.with_dark_colours(player)
    assert figures.dark("#0072b2") in told and figures.INK in told


def test_a_picture_of_its_own_keeps_its_black_ground() -> None:
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.imshow(np.ma.masked_less(np.eye(3), 0.5))
    ax.set_facecolor("black")
    dark = drawn(fig)["-dark"]
    ground = dark[dark.index('id="keep-') :].partition("</g>")[0]
    assert 'fill="#000000"' in dark.partition('id="keep-')[0][-20:]
    assert "<path" in ground


def test_a_figure_says_how_many_panels_stand_abreast_on_a_phone() -> None:
    fig, axes = plt.subplots(2, 4, figsize=(8, 4))
    for ax in axes.flat:
        ax.imshow(np.eye(3))
    fig.phone_columns = 3
    plotting.narrow(fig)
    fig.draw_without_rendering()
    boxes = [ax.get_position() for ax in axes.flat]
    assert len({round(box.y0, 3) for box in boxes[:3]}) == 1
    assert boxes[0].x1 < boxes[1].x0 and boxes[1].x1 < boxes[2].x0
    assert boxes[3].y1 < boxes[2].y0 and round(boxes[3].x0 - boxes[0].x0, 3) == 0

    fig, axes = plt.subplots(1, 5, figsize=(10, 2), width_ratios=[4, 8, 8, 8, 8])
    for ax in axes:
        ax.imshow(np.eye(3))
    fig.phone_columns = 5
    plotting.narrow(fig)
    fig.draw_without_rendering()
    assert fig.get_figwidth() == plotting.PHONE
    assert len({ax.get_subplotspec().rowspan.start for ax in axes}) == 1


def test_a_number_in_a_table_stays_with_its_unit() -> None:
    kept = (
        "5,292.3\u00a0ms",
        "32\u00a0×\u00a032",
        "2\u00a0x\u00a02 pixels",
        "12\u00a0±\u00a05",
        "64\u00a0·\u00a0516",
        "L = 4 blocks",
    )
    assert tuple(plotting._cell(cell.replace("\u00a0", " ")) for cell in kept) == kept
    assert plotting._cell(3) == "3"


def test_long_titles_of_panels_side_by_side_are_broken() -> None:
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    for ax in axes:
        ax.imshow(np.eye(3))
        ax.set_title("a title as long as two or three of these panels")
    plotting.narrow(fig)
    fig.draw_without_rendering()
    left, right = (ax.title.get_window_extent() for ax in axes)
    assert left.x1 < right.x0


def test_three_pictures_with_colour_bars_stand_two_and_one() -> None:
    fig, axes = plt.subplots(1, 3, figsize=(10, 3))
    shown = [ax.imshow(np.eye(3)) for ax in axes]
    both = fig.colorbar(shown[0], ax=axes[:2]).ax
    plotting.narrow(fig)
    fig.draw_without_rendering()
    first, second, third = (ax.get_position() for ax in axes)
    assert first.x1 < second.x0 < both.get_position().x0
    assert third.x0 < second.x0 and third.y1 < min(first.y0, both.get_position().y0)


def test_categories_on_an_axis_are_counted() -> None:
    fig, ax = plt.subplots(figsize=(7, 3))
    ax.barh(["one", "two"], [1, 2])
    assert plotting.narrow(fig)
    plt.close(fig)


def test_a_grid_of_a_command_has_no_paper_between_its_images() -> None:
    images = torch.full((6, 1, 8, 8), -1.0)
    images[1] = 1.0  # white all over: a gap
    grid = pictures._labelled(pictures._arranged(images, 3), ("a", "b"))
    clear = sheets.images_of_sheet(grid, 2, 3)[..., 3] == 0
    assert clear.shape == (2 * 52, 3 * 52)
    assert clear[:2].all() and clear[50:54].all() and clear[:, 50:54].all()
    assert clear[:52, 52:104].all()
    assert not clear[2:50, 2:50].any() and not clear[54:102, 54:102].any()
    with pytest.raises(ValueError, match="3 rows of 3 square images"):
        sheets.images_of_sheet(grid, 3, 3)

    fig, ax = plt.subplots(figsize=(3, 2))
    sheets.draw_sheet(ax, grid, ("a", "b"), 3)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
    assert figures.INK in drawn(fig)["-dark"]  # its words can be read there
