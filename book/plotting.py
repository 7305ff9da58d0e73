"""Figures of the book: palette, style, grids of images, a player for frames.

Importing this module sets the style. Everything a page needs is written into the page:
no network, no kernel.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.core.getipython import get_ipython
from IPython.display import HTML, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

__all__ = [
    "COLORS",
    "frame_player",
    "image_grid",
    "recorded",
    "sizes_as_math",
    "table",
    "told",
    "use_style",
]

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

# Okabe and Ito's palette: told apart with any of the common kinds of colour blindness.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#7F7F7F",
}


def use_style() -> None:
    """Set matplotlib's defaults for the book and, inside a notebook, ask for SVG."""
    mpl.rcParams.update(
        {
            "axes.prop_cycle": mpl.cycler(
                color=[c for name, c in COLORS.items() if name != "yellow"]
            ),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "axes.facecolor": "none",
            "axes.grid": False,
            "figure.figsize": (7.0, 3.2),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",  # readable on the dark theme as well
            "font.size": 10,
            "grid.alpha": 0.3,
            "image.cmap": "gray",
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.6,
            "svg.fonttype": "path",  # the same glyphs on every machine
            "svg.hashsalt": "diffussm",  # the same identifiers in every build
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
        }
    )
    shell = get_ipython()
    if shell is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")  # and no other
        shell.display_formatter.formatters["image/svg+xml"].for_type(Figure, _svg)


def _svg(fig: Figure) -> str:
    """A figure as SVG; for the site, not in JupyterLab, with its narrow drawing inside.

    The site's extension `figures` takes the two apart.
    """
    if "JPY_SESSION_NAME" in os.environ:
        return _drawn(fig)
    _keep_colours(fig)
    wide = _drawn(fig)
    if not narrow(fig):
        return wide
    inside = _drawn(fig)
    inside = inside[inside.index("<svg") :]
    end = wide.rindex("</svg>")
    return f'{wide[:end]}<metadata id="narrow">{inside}</metadata>\n</svg>\n'


def _drawn(fig: Figure) -> str:
    """A figure as SVG, cut to what is drawn."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _keep_colours(fig: Figure) -> None:
    """Name what lies on a picture or on a colour: it stays so in the dark theme."""
    if not any(ax.texts or ax.images for ax in fig.axes):
        return
    fig.draw_without_rendering()
    numbers = itertools.count()
    for ax in fig.axes:
        pictures = [image.get_window_extent() for image in ax.images]
        fills = [
            (patch, [patch.get_path()], patch.get_facecolor()) for patch in ax.patches
        ]
        fills += [(c, c.get_paths(), c.get_facecolor()) for c in ax.collections]
        colours = [
            (artist, path)
            for artist, paths, faces in fills
            for path, face in zip(
                paths, itertools.cycle(mpl.colors.to_rgba_array(faces))
            )
            if face[3] > 0.5 and np.ptp(face[:3]) > 0.1
        ]
        for artist in (*ax.texts, *ax.lines, *ax.patches, *ax.collections, ax.patch):
            box = artist.get_window_extent()
            if not np.isfinite(box.get_points()).all():  # an artist without data
                continue
            middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
            if any(picture.contains(*middle) for picture in pictures) or (
                artist in ax.texts
                and mpl.colors.to_rgb(artist.get_color()) == (0, 0, 0)
                and any(
                    path.contains_point(middle, patch.get_transform())
                    for patch, path in colours
                )
            ):
                artist.set_gid(f"keep-{next(numbers)}")


PHONE = 3.8  # inches; at 340 pixels a text of 9 points is then 11 pixels high
BETWEEN = 0.1  # inches above and below a panel, so that a label ends before a title


def narrow(fig: Figure) -> bool:
    """Rearrange a figure for a phone, and say whether that was needed.

    Panels of a row stand one under another, small ones and pictures two or more
    abreast; of two or three rows, each becomes a column. Twins, colour bars and insets
    move along with their axes. A legend that is too wide stands above all panels. A
    single panel with much text can ask for more room: `fig.phone_width = 5`; panels in
    any number of rows for a number abreast: `fig.phone_columns = 3`.
    """
    width, height = fig.get_size_inches()
    phone = getattr(fig, "phone_width", PHONE)
    places: dict[tuple[int, int], list[Axes]] = {}
    spans = False
    for ax in fig.axes:
        spec = ax.get_subplotspec()
        if spec is not None:
            spans |= len(spec.rowspan) > 1 or len(spec.colspan) > 1
            place = spec.rowspan.start, spec.colspan.start
            places.setdefault(place, []).append(ax)
    if width <= phone or not places:
        return False
    panels = [axes for _, axes in sorted(places.items())]  # twins share one
    rows, columns = panels[0][0].get_gridspec().get_geometry()
    square = all(axes[0].get_aspect() != "auto" for axes in panels)

    abreast = columns
    if rows == 1:
        first = [axes[0] for axes in panels]
        text = any(ax.axison and len(ax.get_yticks()) for ax in first)
        bars = any(ax.get_subplotspec() is None for ax in fig.axes)
        bare = square and not text and not bars
        two = width / columns < 2.8 or all(ax.images for ax in first)
        most = 4 if bare else 2 if two else 1
        abreast = -(-columns // -(-columns // most))
    elif 1 < columns <= 3 >= rows and len(panels) == rows * columns:
        abreast = rows
        panels = [panels[r * columns + c] for c in range(columns) for r in range(rows)]
    asked = getattr(fig, "phone_columns", None)
    abreast = asked or abreast
    if spans or columns == 1 or (abreast == columns and (rows > 1 or asked)):
        tall = height * phone / width if square else min(height, 2.6 * rows)
        fig.set_size_inches(phone, tall)
    else:
        _restack(fig, panels, abreast, min(height / rows, 2.4))
    for axes in panels if abreast > 1 and not spans else []:
        title = axes[0].title
        letters = PHONE / abreast * 72 / (0.6 * title.get_fontsize())
        lines = title.get_text().split("\n")
        title.set_text("\n".join(_broken(line, int(letters)) for line in lines))
    fig.set_layout_engine("constrained", h_pad=BETWEEN)
    for legend in [*fig.legends, *(ax.get_legend() for ax in fig.axes)]:
        if legend is not None:
            _fit_legend(fig, legend)
    return True


def _broken(line: str, letters: int) -> str:
    """A line of a title, broken between words."""
    return textwrap.fill(line, letters, break_long_words=False)


def _restack(fig: Figure, panels: list[list[Axes]], abreast: int, tall: float) -> None:
    """Put panels into a new grid of this many columns, each with its own labels."""
    heights = []
    for start in range(0, len(panels), abreast):
        row = [axes[0] for axes in panels[start : start + abreast]]
        heights.append(
            max(
                tall if ax.get_aspect() == "auto" else _picture_height(ax, abreast)
                for ax in row
            )
        )
    fig.set_size_inches(PHONE, sum(heights) + 2 * BETWEEN * (len(heights) - 1))
    grid = fig.add_gridspec(len(heights), abreast, height_ratios=heights)
    for k, axes in enumerate(panels):
        row, column = divmod(k, abreast)
        alone = column == 0 and axes is panels[-1] and axes[0].get_aspect() == "auto"
        for ax in axes:
            ax.set_subplotspec(grid[row, :] if alone else grid[row, column])
        _label(axes[0])


def _picture_height(ax: Axes, abreast: int) -> float:
    """Inches for axes of a fixed shape, with a line of text."""
    shape = ax.get_data_ratio() * float(ax.get_aspect())
    return min(PHONE / abreast, 0.8 * PHONE) * shape + 0.3


def _label(ax: Axes) -> None:
    """Write at these axes what a neighbour with the same scale carried for both."""
    for name, side in (("x", "bottom"), ("y", "left")):
        neighbours = getattr(ax, f"get_shared_{name}_axes")().get_siblings(ax)
        labels = [getattr(other, f"get_{name}label")() for other in neighbours]
        if len(neighbours) > 1:
            ax.tick_params(axis=name, which="both", **{f"label{side}": True})
            getattr(ax, f"set_{name}label")(labels[neighbours.index(ax)] or max(labels))


def _fit_legend(fig: Figure, legend: Legend) -> None:
    """Put a legend that is too wide above the figure, in as many columns as fit."""
    renderer = fig.canvas.get_renderer()
    if legend.get_window_extent(renderer).width < 0.85 * fig.bbox.width:
        return
    widest = max(text.get_window_extent(renderer).width for text in legend.texts)
    room = fig.bbox.width / (
        widest + 4.5 * fig.dpi / 72 * legend.texts[0].get_fontsize()
    )
    above = fig.legend(
        legend.legend_handles,
        [text.get_text() for text in legend.texts],
        loc="outside upper center",
        ncols=max(1, int(room)),
        fontsize=legend.texts[0].get_fontsize(),
    )
    legend.remove()
    taller = above.get_window_extent(renderer).height / fig.dpi
    fig.set_figheight(fig.get_figheight() + taller)


def recorded(name: str) -> Any:
    """What ``python -m benchmarks.<name>`` last wrote, or nothing."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def sizes_as_math(text: str) -> str:
    """A text in which sizes such as D = 1152 are formulas."""
    return re.sub(r"\b([A-Z] = [\d,]*\d)", r"$\1$", text)


def told(record: dict[str, Any], command: str) -> str:
    """What a record holds, and on which machine it was made, in two sentences."""
    where = record["environment"]
    date = where["date"].replace("-", "\N{NON-BREAKING HYPHEN}")
    return (
        f"{sizes_as_math(record['title'])}. Measured on an {where['processor']} with "
        f"{where['cores']} cores, PyTorch {where['torch']}, {date} (`{command}`)."
    )


def table(
    columns: Sequence[object], rows: Sequence[Sequence[object]], note: str = ""
) -> None:
    """Show a table with these columns, and a note under it."""
    lines = (columns, ["---"] * len(columns), *rows)
    text = ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]
    display(Markdown("\n".join([*text, "", note] if note else text)))


def _cell(value: object) -> str:
    """What stands in a cell: a number on one line with its unit, factor or spread."""
    unit = r"(?<=\d) (?=(?:×|x|ms|s|dB|%|[kMGT]?i?B)(?: |$))"
    pair = r"(?<=\d) (?=[±·] \d|\(\d)|(?<=\d [×x±·]) (?=\d)"
    return re.sub(rf"{unit}|{pair}", "\u00a0", str(value))


def _as_array(image: Any) -> np.ndarray:
    """A tensor (on any device) or an array, as a float array."""
    if hasattr(image, "detach"):
        image = image.detach().cpu().float().numpy()
    return np.asarray(image, dtype=np.float64)


def _channels_last(images: np.ndarray) -> np.ndarray:
    """(n, H, W), (n, 1, H, W) or (n, 3, H, W) -> (n, H, W, 3)."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images are (n, H, W), (n, 1, H, W) or (n, 3, H, W), got {images.shape}"
        )
    return np.moveaxis(
        np.broadcast_to(images, (len(images), 3, *images.shape[2:])), 1, -1
    )


def image_grid(
    images: Any,
    *,
    ncols: int | None = None,
    row_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    cell: float = 0.55,
    gap: int = 1,
    vmin: float = -1.0,
    vmax: float = 1.0,
) -> Figure:
    """Images in rows of ``ncols``, drawn as one picture.

    images: (n, H, W), (n, 1, H, W) or (n, 3, H, W), values from ``vmin`` (black) to
    ``vmax`` (white). row_labels stand left of the rows, titles above the columns.
    ``cell`` is the width of an image in inches, ``gap`` the space between images in
    image pixels. Finish the cell with ``plt.show()``.
    """
    pixels = _channels_last(_as_array(images))
    pixels = np.clip((pixels - vmin) / (vmax - vmin), 0.0, 1.0)
    n, height, width, _ = pixels.shape
    columns = min(n, ncols or (len(titles) if titles else 10))
    rows = -(-n // columns)
    for what, given, expected in (
        ("row_labels", row_labels, rows),
        ("titles", titles, columns),
    ):
        if given is not None and len(given) != expected:
            raise ValueError(
                f"{what}: got {len(given)}, the grid is {rows} rows by {columns} "
                "columns"
            )

    # Whole screen pixels per image pixel: browsers would smooth an 8 x 8 image
    # otherwise.
    scale = max(1, round(cell * 120 / width))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x, space = (height + gap) * scale, (width + gap) * scale, gap * scale
    canvas = np.zeros((rows * step_y - space, columns * step_x - space, 4))
    for i, image in enumerate(pixels):
        top, left = (i // columns) * step_y, (i % columns) * step_x
        place = canvas[top : top + height * scale, left : left + width * scale]
        place[..., :3], place[..., 3] = image, 1  # around them one sees the page

    inches = cell * columns + (1.0 if row_labels else 0.0)
    fig, ax = plt.subplots(
        figsize=(inches, cell * rows * height / width + (0.35 if titles else 0.1))
    )
    ax.imshow(canvas, interpolation="none")
    ax.spines[:].set_visible(False)
    ax.set_xticks(
        np.arange(columns) * step_x + width * scale / 2 if titles else [], titles or []
    )
    ax.set_yticks(
        np.arange(rows) * step_y + height * scale / 2 if row_labels else [],
        row_labels or [],
    )
    ax.tick_params(
        length=0, top=False, bottom=False, labeltop=bool(titles), labelbottom=False
    )
    return fig


def _png(frame: Any, upscale: int) -> bytes:
    """An array with values in [0, 1] as a PNG file."""
    values = _as_array(frame)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] != 3):
        raise ValueError(
            f"a frame is (H, W), (H, W, 3) or a figure, got an array of {values.shape}"
        )
    values = np.rint(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)
    picture = Image.fromarray(values.repeat(upscale, axis=0).repeat(upscale, axis=1))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _frame(frame: Any, upscale: int) -> tuple[str, str, tuple[int, int]]:
    """What a player holds of a frame, its first source, and its size in pixels.

    A figure becomes SVG without a ground, and is closed.
    """
    if isinstance(frame, Figure):
        text = io.StringIO()
        frame.savefig(text, format="svg", facecolor="none", metadata={"Date": None})
        plt.close(frame)
        width, height = frame.get_size_inches() * 96
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        encoded = base64.b64encode(svg.encode()).decode()
        source = f"data:image/svg+xml;base64,{encoded}"
        return svg, source, (round(width), round(height))
    file = _png(frame, upscale)
    encoded = base64.b64encode(file).decode()
    size = Image.open(io.BytesIO(file)).size
    return encoded, f"data:image/png;base64,{encoded}", size


_PLAYER = """\
<{box} class="frame-player" id="{uid}" data-dark="{{}}">
<img src="{first}" alt="{alt}" width="{width}" height="{height}" class="{kind}">
<div class="frame-player-controls">
<button type="button" aria-label="Play" title="Play or pause">&#9654;</button>
<input type="range" min="0" max="{last}" step="1" value="{start}"
 aria-label="Frame of: {alt}">
<output>{label}</output>
</div>{caption}
<script>
(() => {{
  const box = document.getElementById("{uid}");
  const frames = {frames};
  const labels = {labels};
  const [image, range, output, button] =
    ["img", "input", "output", "button"].map((name) => box.querySelector(name));
  let timer = null;
  // On the site's dark theme, drawings have the colours that stand here.
  const dark = JSON.parse(box.dataset.dark);
  const root = document.documentElement;
  const painted = (svg) => root.dataset.theme !== "dark" ? svg : svg
    .replace("<svg", `<svg fill="${{dark["#000000"] ?? "#000000"}}"`)
    .replace(/#[0-9a-f]{{6}}\\b/g, (colour) => dark[colour] ?? colour);
  const source = (frame) => frame.startsWith("<")
    ? "data:image/svg+xml," + encodeURIComponent(painted(frame))
    : "data:image/png;base64," + frame;
  const show = () => {{
    const i = Number(range.value);
    image.src = source(frames[i]);
    output.textContent = labels[i];
    range.setAttribute("aria-valuetext", labels[i]);
  }};
  const stop = () => {{
    clearInterval(timer);
    timer = null;
    button.textContent = "\\u25B6";
    button.setAttribute("aria-label", "Play");
  }};
  const step = () => {{
    if (Number(range.value) >= frames.length - 1) return stop();
    range.value = Number(range.value) + 1;
    show();
  }};
  button.addEventListener("click", () => {{
    if (timer !== null) return stop();
    if (Number(range.value) >= frames.length - 1) range.value = 0;
    show();
    timer = setInterval(step, {interval});
    button.textContent = "\\u275A\\u275A";
    button.setAttribute("aria-label", "Pause");
  }});
  range.addEventListener("input", () => {{ stop(); show(); }});
  // Someone who asked for less motion moves through the frames by hand.
  if (window.matchMedia("(prefers-reduced-motion: reduce)").matches)
      button.hidden = true;
  new MutationObserver(show).observe(root, {{attributeFilter: ["data-theme"]}});
  show();
}})();
</script>
</{box}>
"""


def frame_player(
    frames: Sequence[Any],
    labels: Sequence[str],
    caption: str = "",
    alt: str = "",
    *,
    start: int = 0,
    upscale: int = 1,
    interval: int = 500,
) -> HTML:
    """Precomputed frames with a slider and a play button; needs no kernel.

    frames: arrays (H, W) or (H, W, 3) with values in [0, 1], or matplotlib figures
    (closed afterwards). labels: one short text a frame, shown beside the slider.
    ``start`` is the frame seen first (negative counts from the end), ``upscale``
    repeats every pixel, ``interval`` is the time per frame in milliseconds. Leave
    ``caption`` empty where the cell's metadata has one.
    """
    if not len(frames) or len(frames) != len(labels):
        raise ValueError(
            f"one label a frame: got {len(frames)} frames and {len(labels)} labels"
        )
    if not alt:
        raise ValueError(
            "alt: say in a sentence what the frames show, for someone who cannot "
            "see them"
        )
    held, sources, sizes = zip(
        *(_frame(frame, upscale) for frame in frames), strict=True
    )
    width, height = sizes[0]
    names = [str(label) for label in labels]
    start %= len(held)
    digest = hashlib.sha256("".join([*held, alt, caption, *names]).encode()).hexdigest()
    return HTML(
        _PLAYER.format(
            box="figure" if caption else "div",
            uid=f"player-{digest[:12]}",
            first=sources[start],
            kind="drawing" if held[start].startswith("<") else "dark-light",
            alt=html.escape(alt, quote=True),
            width=width,
            height=height,
            last=len(held) - 1,
            start=start,
            label=html.escape(names[start]),
            caption=f"\n<figcaption>{html.escape(caption)}</figcaption>"
            if caption
            else "",
            frames=json.dumps(held).replace("</", "<\\/"),
            labels=json.dumps(names).replace("</", "<\\/"),
            interval=interval,
        )
    )


use_style()
