"""Figures of the book: palette, style, grids of images, a player for frames.

Importing this module sets the style. Everything a page needs is written into the page:
no network, no kernel.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.core.getipython import get_ipython
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["COLORS", "frame_player", "image_grid", "recorded", "table", "use_style"]

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
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def recorded(name: str) -> Any:
    """What ``python -m benchmarks.<name>`` last wrote, or nothing."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
    """Show a table with these columns."""
    lines = (columns, ["---"] * len(columns), *rows)
    text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    display(Markdown("\n".join(text)))


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
    canvas = np.ones((rows * step_y - space, columns * step_x - space, 3))
    for i, image in enumerate(pixels):
        top, left = (i // columns) * step_y, (i % columns) * step_x
        canvas[top : top + height * scale, left : left + width * scale] = image

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


def _png(frame: Any, upscale: int, dpi: int) -> bytes:
    """One frame as a PNG file: an array in [0, 1], or a figure, then closed."""
    buffer = io.BytesIO()
    if isinstance(frame, Figure):
        frame.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        plt.close(frame)
        # A palette of 256 colours is indistinguishable for line art and a third of the
        # size.
        picture = (
            Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        )
        buffer = io.BytesIO()
    else:
        values = _as_array(frame)
        if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] != 3):
            raise ValueError(
                "a frame is (H, W), (H, W, 3) or a figure, got an array of "
                f"{values.shape}"
            )
        values = np.rint(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)
        picture = Image.fromarray(
            values.repeat(upscale, axis=0).repeat(upscale, axis=1)
        )
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


_PLAYER = """\
<{box} class="frame-player" id="{uid}">
<img src="{first}" alt="{alt}" width="{width}" height="{height}">
<div class="frame-player-controls">
<button type="button" aria-label="Play" title="Play or pause">&#9654;</button>
<input type="range" min="0" max="{last}" step="1" value="{start}" aria-label="Frame">
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
  const show = () => {{
    const i = Number(range.value);
    image.src = "data:image/png;base64," + frames[i];
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
    dpi: int = 96,
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
    files = [_png(frame, upscale, dpi) for frame in frames]
    width, height = Image.open(io.BytesIO(files[0])).size
    names = [str(label) for label in labels]
    start %= len(files)
    digest = hashlib.sha256(
        b"".join(files) + "".join([alt, caption, *names]).encode()
    ).hexdigest()
    encoded = [base64.b64encode(file).decode() for file in files]
    return HTML(
        _PLAYER.format(
            box="figure" if caption else "div",
            uid=f"player-{digest[:12]}",
            first=f"data:image/png;base64,{encoded[start]}",
            alt=html.escape(alt, quote=True),
            width=width,
            height=height,
            last=len(files) - 1,
            start=start,
            label=html.escape(names[start]),
            caption=f"\n<figcaption>{html.escape(caption)}</figcaption>"
            if caption
            else "",
            frames=json.dumps(encoded),
            labels=json.dumps(names).replace("</", "<\\/"),
            interval=interval,
        )
    )


use_style()
