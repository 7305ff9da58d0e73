"""Figures that answer a hand: in the rendered page a script, at a kernel widgets.

A cell's one output has both. A notebook takes the widgets, which call the chapter's own
Python; the rendered page, and a notebook without widgets, take the box with the still
picture. There, a script of `book/_js` puts what moves in its place.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display
from ipywidgets import Button, ValueWidget, VBox, interactive, interactive_output
from matplotlib.figure import Figure
from traitlets import Int

__all__ = ["Presses", "explorable"]

AT_ONCE = 0.1  # seconds that a figure may take and still follow the hand


class Presses(ValueWidget, Button):  # type: ignore[misc]
    """A button whose value is how often it has been pressed."""

    value = Int(0)

    def __init__(self, value: int = 0, **look: Any) -> None:
        super().__init__(**look)
        self.value = value
        self.on_click(self._count)

    def _count(self, _: Button) -> None:
        self.value += 1


def explorable(
    name: str,
    draw: Callable[..., Figure],
    *,
    data: dict[str, Any] | None = None,
    anchor: str = "",
    **controls: Any,
) -> None:
    """Show what ``draw`` draws, with a control for each of its arguments.

    name: the module of `book/_js` that the rendered page runs. It is given ``data`` (as
    JSON) and the first value of each control. draw: its docstring says what the still
    picture shows, for those who do not see it. anchor: an identifier of the box, for
    links. controls: a widget with its range and its first value, `Presses`, or what
    `ipywidgets.interact` would make a widget of, such as a list. Sliders follow the
    hand where the figure is drawn quickly enough; else they wait until it lets go.
    """
    widgets = {
        key: interactive.widget_from_abbrev(control)
        for key, control in controls.items()
    }

    def show(**values: Any) -> None:
        figure = draw(**values)
        plt.close(figure)  # or the notebook shows it once more
        display(figure)

    output = interactive_output(show, widgets)
    first = {key: widget.value for key, widget in widgets.items()}
    began = perf_counter()
    picture = draw(**first)
    plt.close(picture)  # ipywidgets shows what is open
    still = _svg(picture)
    slow = perf_counter() - began > AT_ONCE
    for key, widget in widgets.items():
        widget.description = widget.description or key
        widget.style.description_width = "initial"  # or a long name is cut
        if slow and widget.has_trait("continuous_update"):
            widget.continuous_update = False
    alt = " ".join((inspect.getdoc(draw) or "").split())
    bundle = VBox([*widgets.values(), output])._repr_mimebundle_()
    bundle["text/html"] = _box(name, still, alt, (data or {}) | first, anchor)
    display(bundle, raw=True)


def _svg(figure: Figure) -> str:
    """A figure as the address of a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _box(name: str, picture: str, alt: str, given: dict[str, Any], anchor: str) -> str:
    alt, identifier = html.escape(alt, quote=True), f' id="{anchor}"' if anchor else ""
    text = json.dumps(given).replace("</", "<\\/")
    return (
        f'<div class="explorable"{identifier} data-name="{name}" role="group" '
        f'aria-label="{alt}">'
        f'<img class="explorable-still" src="{picture}" alt="{alt}">'
        f'<script type="application/json">{text}</script></div>'
    )
