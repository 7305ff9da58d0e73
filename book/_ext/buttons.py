"""Buttons above a chapter: its notebook to download, and where to run it.

The notebook runs by itself, and says what to install (`tools.standalone`). Where
`_config.yml` has `repository: {url: ...}`, there is a button for the repository, and if
that is on GitHub, one for Binder and one for Colab. Binder opens the page in a checkout
(`.binder`). Colab opens notebooks only, and only from a branch: the workflow that
publishes the pages (`pages.yml`) puts them on one of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from sphinx.application import Sphinx
from sphinx.config import Config

FOLDER = "notebooks"
PUBLISHED = "notebooks"  # the branch
BINDER = "https://mybinder.org/v2/gh/{name}/{branch}?urlpath=lab/tree/{page}.md"
COLAB = "https://colab.research.google.com/github/{name}/blob/{pages}/{notebook}"


def show_repository(app: Sphinx, config: Config) -> None:
    """Let the theme show its button, if there is an address."""
    options = config.html_theme_options
    options["use_repository_button"] = bool(options.get("repository_url"))


def launchers(url: str, branch: str, page: str, notebook: str) -> list[dict[str, str]]:
    """The buttons of a page whose repository is on GitHub; elsewhere there are none."""
    host, _, name = url.rstrip("/").partition("github.com/")
    if host != "https://" or not name:
        return []
    binder = BINDER.format(name=name, branch=branch or "main", page=page)
    colab = COLAB.format(name=name, pages=PUBLISHED, notebook=notebook)
    return [
        link("Binder", "Run on Binder", "_static/images/logo_binder.svg", binder),
        link("Colab", "Run on Colab", "_static/images/logo_colab.png", colab),
    ]


def link(text: str, tooltip: str, icon: str, url: str) -> dict[str, str]:
    """A button as the theme has it."""
    return {"type": "link", "text": text, "tooltip": tooltip, "icon": icon, "url": url}


def add_buttons(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Write the page's notebook, and add the buttons to those of the theme."""
    if "kernelspec" not in app.env.metadata.get(page, {}):
        return
    from tools.standalone import standalone

    try:
        whole = standalone(Path(app.env.doc2path(page)), Path(app.srcdir))
    except ValueError:  # it works on the checkout itself
        return
    notebook = f"{FOLDER}/{Path(page).name}.ipynb"
    target = Path(app.outdir, notebook)
    target.parent.mkdir(exist_ok=True)
    nbformat.write(whole, target)
    address = context["pathto"](notebook, 1)
    download = link(".ipynb", "Download as a notebook", "fas fa-code", address)
    buttons = context["header_buttons"]
    for group in buttons:
        if group.get("label") == "download-buttons":
            group["buttons"].insert(0, download)
    options = app.config.html_theme_options
    url, branch = options.get("repository_url"), options.get("repository_branch", "")
    if url and (offered := launchers(url, branch, page, notebook)):
        group = {"type": "group", "tooltip": "Run this page", "icon": "fas fa-rocket"}
        buttons.append({**group, "buttons": offered, "label": "launch-buttons"})


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.connect("config-inited", show_repository)
    app.connect("html-page-context", add_buttons, priority=502)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
