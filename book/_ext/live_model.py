"""The model in the page: its weights as a script, and its place on pages without cells.

The chapter that trains the model glues its weights, as it does numbers for a sentence.
From there they go into one script, which pages ask for when the model is first used.
Only where this build has not executed the chapter do the weights that come with the
package stand in. The directive `live-model` is the place on a page without cells.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

SCRIPT = "live_model.js"
CHAPTER = "book/36_training"
FRONT = "book/index"
GLUED = "page-model"


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


def trained(env: BuildEnvironment) -> Any:
    """The page's model as this build's chapter has it, or that of the package.

    Raises:
        ExtensionError: the chapter was executed, and its model is not where myst-nb
            keeps what is glued.
    """
    about = getattr(env, "nb_metadata", {}).get(CHAPTER, {})
    if "exec_data" not in about:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from page_model import shipped  # not at the top: it takes seconds

        return shipped()
    kept = Path(env.mystnb_config.output_folder, f"{CHAPTER}.glue.json")
    glued = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    if GLUED not in about.get("glue", []) or GLUED not in glued:
        raise ExtensionError(
            f"{CHAPTER}.md was executed, and there is no {GLUED!r} in {kept}: the "
            "pages would show another model than the one that it has trained"
        )
    return glued[GLUED]["data"]["application/json"]


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
            text = box(trained(self.env), auto=True)
            place.replace_self(nodes.raw("", text, format="html"))


def follow(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], _: set[str]
) -> list[str]:
    """The front page shows what the chapter has trained: it is made anew with it."""
    return [FRONT] if CHAPTER in added | changed and FRONT in env.found_docs else []


def write(app: Sphinx, error: Exception | None) -> None:
    """Called by Sphinx at the end."""
    if error is None and {FRONT, CHAPTER} & app.env.found_docs:
        target = Path(app.outdir, "_static", SCRIPT)
        target.write_text(script(trained(app.env)["packed"]), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(Place)
    app.add_directive("live-model", PlaceHere)
    app.add_post_transform(Fill)
    app.connect("env-get-outdated", follow)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
