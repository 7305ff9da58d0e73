"""The model in the page: its weights as a script, and its place on pages without cells.

The chapter that trains the model puts its weights into the output of a cell. From there
they go into one script, which pages ask for when the model is first used. Where the
chapter has not been executed, the weights that come with the package stand in. The
directive `live-model` is the place on a page without cells.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

SCRIPT = "live_model.js"
CHAPTER = "36_training"
MIME = "application/vnd.diffussm.page-model+json"
USERS = {"book/index", f"book/{CHAPTER}"}


def script(packed: dict[str, Any]) -> str:
    """What a page loads to have the weights."""
    return f"globalThis.liveModel = {json.dumps(packed)};\n"


def picture(levels: str, scale: int = 8) -> str:
    """A strip of two rows of digits as the address of a PNG file, pixels enlarged."""
    strip = np.frombuffer(base64.b64decode(levels), np.uint8).reshape(2, -1, 8, 8)
    framed = np.pad(strip, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=128)
    grid = framed.transpose(0, 2, 1, 3).reshape(18, -1)[:-1, :-1]
    buffer = io.BytesIO()
    enlarged = grid.repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(enlarged).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def box(model: dict[str, Any], auto: bool) -> str:
    """The place of the model on a page; `auto` draws a digit when it is first seen."""
    given = {"label": model["label"], "strip": model["strip"], "auto": auto}
    return (
        '<div class="explorable" id="live-model" data-name="live-model" role="group" '
        'aria-label="The model of this book, which draws digits">'
        f'<img class="explorable-still" src="{picture(model["strip"])}" alt="A '
        f"{model['label']} grows from noise in eight steps: above, what the chain "
        'holds; below, the digit that the network then believes in.">'
        f'<script type="application/json">{json.dumps(given)}</script></div>'
    )


@lru_cache
def trained(executed: Path) -> Any:
    """The page's model out of an executed chapter, or that of the package."""
    cells = (
        json.loads(executed.read_text("utf-8"))["cells"] if executed.exists() else []
    )
    for cell in cells:
        for output in cell.get("outputs", []):
            if MIME in output.get("data", {}):
                return output["data"][MIME]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from page_model import shipped  # not at the top: it takes seconds

    return shipped()


def executed(app: Sphinx) -> Path:
    """Where myst-nb leaves the chapter with its outputs."""
    return Path(app.outdir).parent / "jupyter_execute" / "book" / f"{CHAPTER}.ipynb"


class Place(nodes.General, nodes.Element):
    """Where the model stands."""


class PlaceHere(SphinxDirective):
    """The directive."""

    def run(self) -> list[nodes.Node]:
        """Called by docutils."""
        return [Place()]


class Fill(SphinxPostTransform):
    """Put the box with the prepared digit there, once all pages have been read."""

    default_priority = 200

    def run(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        for place in list(self.document.findall(Place)):
            text = box(trained(executed(self.app)), auto=True)
            place.replace_self(nodes.raw("", text, format="html"))


def write(app: Sphinx, error: Exception | None) -> None:
    """Called by Sphinx at the end."""
    if error is None and USERS & app.env.found_docs:
        packed = trained(executed(app))["packed"]
        target = Path(app.outdir, "_static", SCRIPT)
        target.write_text(script(packed), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(Place)
    app.add_directive("live-model", PlaceHere)
    app.add_post_transform(Fill)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
