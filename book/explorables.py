"""Figures that answer a hand: in the rendered page a script, at a kernel widgets.

A cell's one output has both. A notebook takes the widgets, which call the chapter's own
Python; the rendered page, and a notebook without widgets, take the box with the still
picture. There, a script of `book/_js` puts what moves in its place.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

__all__ = ["explorable"]


def explorable(
    name: str,
    draw: Callable[..., Figure],
    *,
    alt: str,
    data: dict[str, Any] | None = None,
    anchor: str = "",
    **controls: Any,
) -> None:
    """Show what ``draw`` draws, with a control for each of its arguments.

    name: the module of `book/_js` that the rendered page runs. It is given ``data`` (as
    JSON) and the first value of each control. alt: what the still picture shows.
    anchor: an identifier of the box, for links. controls: as ``ipywidgets.interact``
    takes them, for example a widget, with its range, its step and its first value.
    """
    import ipywidgets

    widgets = {
        key: ipywidgets.interactive.widget_from_abbrev(control)
        for key, control in controls.items()
    }
    for widget in widgets.values():  # or a long name is cut
        widget.style.description_width = "initial"

    def show(**values: Any) -> None:
        figure = draw(**values)
        plt.close(figure)  # or the notebook shows it once more
        display(figure)

    picture = draw(**{key: widget.value for key, widget in widgets.items()})
    plt.close(picture)  # ipywidgets shows what is open
    given = (data or {}) | {key: widget.value for key, widget in widgets.items()}
    output = ipywidgets.interactive_output(show, widgets)
    twin = ipywidgets.VBox([*widgets.values(), output])
    bundle = twin._repr_mimebundle_()
    bundle["text/html"] = _box(name, _svg(picture), alt, given, anchor)
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
