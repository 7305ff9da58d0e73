"""The book on paper: links within the one page, and what is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import pdf

PAGE = """<html><head><title>Book</title>
<link rel="stylesheet" type="text/css" href="../_static/book.css" /></head><body>
<nav>left out</nav><article class="bd-article">{}</article></body></html>"""


def rendered(folder: Path, **pages: str) -> Path:
    (folder / "book").mkdir(parents=True)
    for name, text in pages.items():
        (folder / "book" / f"{name}.html").write_text(PAGE.format(text))
    return folder


def test_links_lead_to_places_of_the_one_page(tmp_path: Path) -> None:
    folder = rendered(
        tmp_path,
        first='<h1 id="top">A</h1><a href="second.html#top">x</a><a href="#top">y</a>',
        second='<h1 id="top">B</h1><a href="first.html">z</a><a href="http://a/b">w</a>'
        '<img src="../_images/a.svg">',
    )
    text = pdf.one_page(["book/first", "book/second"], folder)
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) == 4
    inner = re.findall(r'href="#([^"]+)"', text)
    assert inner == ["second--top", "first--top", "first"]
    assert set(inner) <= set(ids)
    assert 'href="http://a/b"' in text and 'src="../html/_images/a.svg"' in text
    assert "left out" not in text and "../html/_static/book.css" in text


MATHJAX = '<script defer="defer" src="../_static/mathjax/startup.js?v=1"></script>'


def test_formulas_are_set_though_the_first_page_has_none(tmp_path: Path) -> None:
    folder = rendered(tmp_path, first='<p class="mathjax_ignore">A</p>', second="x")
    second = folder / "book" / "second.html"
    second.write_text(second.read_text().replace("</head>", f"{MATHJAX}</head>"))
    text = pdf.one_page(["book/first", "book/second"], folder)
    assert "../html/_static/mathjax/startup.js" in text


@pytest.mark.end_to_end
def test_formulas_that_are_not_set_are_not_printed(
    tmp_path: Path, browser: Any
) -> None:
    rendered(tmp_path / "_build" / "html", first='<span class="math">\\(N\\)</span>')
    command = "import sys; from pathlib import Path; from tools import pdf; " + (
        f"pdf.ROOT = Path({str(tmp_path)!r}); "
        f"sys.exit(pdf.main(['book/first', '--out', {str(tmp_path / 'a.pdf')!r}]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and "1 formulas were not set" in run.stderr
    assert not (tmp_path / "a.pdf").exists()


def test_a_page_that_is_not_rendered_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf, "ROOT", tmp_path)
    monkeypatch.setattr(pdf.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert pdf.main(["book/gone"]) == 1
    assert "gone.html is missing: run `make book`" in capsys.readouterr().err


def test_without_chromium_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    assert pdf.main([]) == 1
    assert "install Chromium" in capsys.readouterr().err


@pytest.mark.end_to_end
def test_paper_shows_what_is_read_and_no_controls(browser: Any) -> None:
    """Code wraps; folds and buttons are not there; a player's label is."""
    style = Path(__file__).parents[1] / "book" / "_static" / "book.css"
    code = "x = " + " + ".join(f"name_{i}" for i in range(60))
    tab = browser.new_page(viewport={"width": pdf.WIDTH, "height": 900})
    tab.set_content(
        f"<style>{style.read_text('utf-8')}</style><article class='bd-article'>"
        f"<div class='cell_input'><div class='highlight'><pre>{code}</pre></div></div>"
        "<style>details summary.a .sd-summary-state-marker {display: block}</style>"
        "<details open><summary class='a'>Why?<i class='sd-summary-state-marker'>v</i>"
        "</summary>Because.</details>"
        "<details class='fold fold-under'><summary>Code</summary>c</details>"
        "<div class='frame-player'><div class='frame-player-controls'>"
        "<button>Play</button><output>t = 3</output></div></div></article>"
    )
    tab.emulate_media(media="print")
    pre = tab.locator("pre")
    assert pre.evaluate("e => e.scrollWidth <= e.clientWidth")
    # or the box begins on one sheet, empty, and its code stands on the next
    inside = "e => getComputedStyle(e).breakInside"
    assert tab.locator(".cell_input").evaluate(inside) == "avoid"
    assert not tab.locator(".sd-summary-state-marker").is_visible()
    assert not tab.locator(".fold-under").is_visible()
    assert not tab.locator("button").is_visible() and tab.locator("output").is_visible()
    tab.close()
