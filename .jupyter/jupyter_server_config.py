"""For `make lab`: to look at a text notebook changes nothing.

JupyterLab marks a notebook as changed when its kernel tells it about the language; so
chapters are handed out with what this kernel will say. jupytext does not write it into
the file. Folded cells and references, too, are handed out as JupyterLab can show them.
"""

import re
from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from jupytext import AsyncTextFileContentsManager

from tools.readable import readable, restored

KERNEL = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}
HEADER = {
    ".md": re.compile(r"\A---\n.*?^---\n\n*", re.DOTALL | re.MULTILINE),
    ".py": re.compile(r"\A# ---\n.*?^# ---\n\n*", re.DOTALL | re.MULTILINE),
}


FOLDED = {
    "hide-input": {"source_hidden": True},
    "hide-output": {"outputs_hidden": True},
    "hide-cell": {"source_hidden": True, "outputs_hidden": True},
    "remove-input": {"source_hidden": True},
    "remove-cell": {"source_hidden": True},
}


def dress(notebook, page):
    """Fold what the pages fold, and write references as words and links."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = readable(cell["source"], keep=page)
        for tag in cell["metadata"].get("tags", []):
            cell["metadata"].setdefault("jupyter", {}).update(FOLDED.get(tag, {}))


def undress(notebook):
    """What `dress` was given."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = restored(cell["source"])
        cell["metadata"].pop("jupyter", None)


class TextNotebooks(AsyncTextFileContentsManager):
    """Notebooks stored as text, complete with kernel and language."""

    async def get(self, path, content=True, type=None, *arguments, **options):
        """As in any contents manager."""
        model = await super().get(path, content, type, *arguments, **options)
        if content and model["type"] == "notebook" and not path.endswith(".ipynb"):
            metadata = model["content"]["metadata"]
            metadata.setdefault("kernelspec", dict(KERNEL))
            metadata.setdefault("language_info", dict(IPythonKernel.language_info))
            dress(model["content"], Path(path).stem)
        return model

    async def save(self, model, path=""):
        """As in any contents manager."""
        if model["type"] == "notebook" and not path.endswith(".ipynb"):
            undress(model["content"])
        return await super().save(model, path)


def keep_without_header(model, path, contents_manager, **_):
    """Drop jupytext's new header from a page without cells or a module."""
    header = HEADER.get(Path(path).suffix)
    if (
        header is None
        or model.get("type") != "file"
        or not isinstance(model.get("content"), str)
    ):
        return
    there = Path(contents_manager.root_dir, path.strip("/"))
    if there.is_file() and not header.match(there.read_text(encoding="utf-8")):
        model["content"] = header.sub("", model["content"])


c.ServerApp.contents_manager_class = TextNotebooks  # noqa: F821, c is given by Jupyter
c.FileContentsManager.pre_save_hook = keep_without_header  # noqa: F821
