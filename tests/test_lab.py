"""`make lab` in a real browser: looking at a file changes nothing, and saving a chapter
adds nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.book import ROOT

pytestmark = pytest.mark.end_to_end

CLEAN = "() => !document.querySelector('.lm-TabBar-tab.jp-mod-dirty')"
CHAPTER = "book/21_hourglass.md"
MOVING = "book/11_state_space.md"
PLAIN = ("README.md", "book/notation.md")
PROMPTS = (  # a folded cell shows none
    "[...document.querySelectorAll("
    "'.jp-CodeCell:not(:has(.jp-Placeholder)) .jp-InputArea-prompt')]"
)
MODULES = ("diffussm/hourglass.py",)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what JupyterLab is shown, so that no fault touches the real files."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("book", "diffussm", ".jupyter"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("README.md", "jupytext.toml"):
        shutil.copy(ROOT / name, folder / name)
    for chapter, cells in ((CHAPTER, 12), (MOVING, 4)):  # beginnings suffice
        text = (folder / chapter).read_text()
        parts = re.split(r"(?<=^```\n)", text, flags=re.MULTILINE)
        (folder / chapter).write_text("".join(parts[:cells]))
    return folder


@pytest.fixture(scope="module")
def lab(checkout: Path) -> Iterator[str]:
    """JupyterLab as `make lab` starts it, with settings of its own for this user."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = checkout.parent / "home"
    environment = os.environ | {
        "JUPYTER_CONFIG_PATH": str(checkout / ".jupyter"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    notebooks = home / "settings" / "@jupyterlab" / "notebook-extension"
    notebooks.mkdir(parents=True)  # all cells are there, also those out of sight
    (notebooks / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        f"--notebook-dir={checkout}",
        f"--port={port}",
    ]
    command += [
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        "--ServerApp.port_retries=0",
    ]
    with (checkout.parent / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, cwd=checkout, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/api", timeout=5) as answer:
                    json.load(answer)
                break
            except OSError:
                assert server.poll() is None, (checkout.parent / "lab.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        for _ in range(2):  # the second time without shutting down kernels one by one
            server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def opened(browser: Any, lab: str, path: str) -> Any:
    """A tab of the browser in which JupyterLab has opened a file as a double click
    does.
    """
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(f"{lab}/lab/workspaces/{Path(path).stem}/tree/{path}?reset")
    page.locator(
        f".lm-TabBar-tab.lm-mod-current:has-text('{Path(path).name}')"
    ).first.wait_for()
    return page


def ready(browser: Any, lab: str, path: str) -> Any:
    """The same of a chapter, whose cells are there and whose kernel waits."""
    page = opened(browser, lab, path)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(state="attached")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    return page


def choose(page: Any, menu: str, command: str) -> None:
    """Choose an entry of a menu."""
    page.locator(f".lm-MenuBar-item:has-text('{menu}')").first.click()
    page.locator(f".lm-Menu-item[data-command='{command}']").first.click()


def dirty(page: Any) -> bool:
    return page.locator(".lm-TabBar-tab.jp-mod-dirty").count() > 0


def test_a_chapter_that_was_only_looked_at_asks_nothing(
    checkout: Path, lab: str, browser: Any
) -> None:
    before = (checkout / CHAPTER).read_bytes()
    page = ready(browser, lab, CHAPTER)
    page.wait_for_function(CLEAN)  # while it opens, it may be marked for a moment
    page.wait_for_timeout(1000)
    assert not dirty(page)
    page.locator(
        ".lm-TabBar-tab.lm-mod-current:has-text('.md') .lm-TabBar-tabCloseIcon"
    ).first.click()
    page.wait_for_timeout(1000)
    assert page.locator(".jp-Dialog").count() == 0
    assert (checkout / CHAPTER).read_bytes() == before
    page.close()


def test_a_chapter_that_was_run_is_saved_as_it_was(
    checkout: Path, lab: str, browser: Any
) -> None:
    before = (checkout / CHAPTER).read_text()
    page = ready(browser, lab, CHAPTER)
    cells = len(re.findall(r"^```\{code-cell\}", before, re.MULTILINE))
    choose(page, "Run", "runmenu:run-all")
    page.wait_for_function(
        f"() => {PROMPTS}.length && {PROMPTS}.every(p => "
        "/\\[\\d+\\]/.test(p.textContent))"
    )
    assert cells >= 3 and dirty(page)
    choose(page, "File", "docmanager:save")
    page.locator(".lm-TabBar-tab.jp-mod-dirty").wait_for(state="detached")
    assert (checkout / CHAPTER).read_text() == before
    page.close()


def test_cells_are_folded_and_references_read_as_words(
    lab: str, checkout: Path, browser: Any
) -> None:
    page = ready(browser, lab, CHAPTER)
    text = (checkout / CHAPTER).read_text()
    folded = len(re.findall(r"^:?tags: .*hide-input|^:tags: .*remove", text, re.M))
    assert page.locator(".jp-CodeCell .jp-Placeholder").count() == folded >= 2
    page.locator(".jp-MarkdownCell a:has-text('Both directions')").first.wait_for()
    shown = " ".join(page.locator(".jp-MarkdownCell").all_inner_texts())
    assert not re.search(r"\b(ch|fig|sec)-[a-z]", shown), shown
    page.close()


def test_a_slider_and_a_button_move_the_figure(lab: str, browser: Any) -> None:
    page = ready(browser, lab, MOVING)
    choose(page, "Run", "runmenu:run-all")
    figure = page.locator(".jp-OutputArea-output .jupyter-widgets .jp-RenderedSVG img")
    figure.first.wait_for()
    assert figure.count() == 1 and page.locator(".explorable").count() == 0
    slider = page.locator(".jupyter-widgets .noUi-handle").first
    push = page.locator("button.jupyter-button", has_text="push")
    for move in (lambda: slider.press("ArrowRight"), push.click):
        before = figure.get_attribute("src")
        move()
        page.wait_for_function(
            "before => { const f = document.querySelector("
            "'.jupyter-widgets .jp-RenderedSVG img'); return f && f.src !== before; }",
            arg=before,
        )
    page.close()


@pytest.mark.parametrize("path", [*PLAIN, *MODULES])
def test_saving_a_page_without_cells_or_a_module_adds_no_header(
    path: str, checkout: Path, lab: str, browser: Any
) -> None:
    before = (checkout / path).read_text()
    page = opened(browser, lab, path)
    page.wait_for_timeout(3000)
    assert page.locator(".jp-Dialog").count() == 0
    page.keyboard.press("Control+S")
    page.wait_for_timeout(2000)
    assert (checkout / path).read_text() == before
    page.close()
