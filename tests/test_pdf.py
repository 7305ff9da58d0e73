"""The book on paper: links within the one page, and what is printed."""

from __future__ import annotations

import re
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
        f"<div class='highlight'><pre>{code}</pre></div>"
        "<details class='fold fold-under'><summary>Code</summary>c</details>"
        "<div class='frame-player'><div class='frame-player-controls'>"
        "<button>Play</button><output>t = 3</output></div></div></article>"
    )
    tab.emulate_media(media="print")
    pre = tab.locator("pre")
    assert pre.evaluate("e => e.scrollWidth <= e.clientWidth")
    assert not tab.locator(".fold-under").is_visible()
    assert not tab.locator("button").is_visible() and tab.locator("output").is_visible()
    tab.close()
