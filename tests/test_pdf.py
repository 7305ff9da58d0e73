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


def printed(folder: Path, page: str, *options: str) -> tuple[int, str, Path]:
    """Print a book of one page; exit code, what was said, and the PDF."""
    rendered(folder / "_build" / "html", first=page)
    command = "import sys; from pathlib import Path; from tools import pdf; " + (
        f"pdf.ROOT = Path({str(folder)!r}); sys.exit(pdf.main(sys.argv[1:]))"
    )
    target = folder / "a.pdf"
    words = ["book/first", "--out", str(target), *options]
    run = subprocess.run(
        [sys.executable, "-c", command, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stderr, target


@pytest.mark.end_to_end
def test_formulas_that_are_not_set_are_not_printed(
    tmp_path: Path, browser: Any
) -> None:
    code, said, target = printed(tmp_path, '<span class="math">\\(N\\)</span>')
    assert code == 1 and "1 formulas were not set" in said
    assert not target.exists()


@pytest.mark.end_to_end
def test_what_is_wider_than_the_sheet_is_named(tmp_path: Path, browser: Any) -> None:
    wide = "overflow-x: auto; overflow-y: hidden; display: block"
    page = (
        f'<mjx-container display="true" style="{wide}">'
        f'<div style="width: {pdf.WIDTH + 20}px">b = c</div></mjx-container>'
        "<table><tr><td>fits</td></tr></table>"
    )
    code, said, target = printed(tmp_path / "a", page)
    assert code == 1 and "wider than the sheet:\nfirst, mjx-container, b = c\n" in said
    assert "fits" not in said and not target.exists()
    code, said, target = printed(tmp_path / "b", page.replace("width", "max-width"))
    assert (code, said) == (0, "") and target.exists()


@pytest.mark.end_to_end
def test_a_browser_that_is_too_slow_says_what_to_do(
    tmp_path: Path, browser: Any
) -> None:
    code, said, _ = printed(tmp_path, "A", "--minutes", "1e-6")
    assert code == 1 and "give it more with --minutes" in said


@pytest.mark.end_to_end
def test_paper_is_as_wide_as_the_page_was_laid_out(browser: Any) -> None:
    """Or a formula that fits the page would be cut on the sheet."""
    style = Path(__file__).parents[1] / "book" / "_static" / "book.css"
    tab = browser.new_page(viewport={"width": pdf.WIDTH, "height": 900})
    theme = (
        "@media print { .bd-main .bd-content { margin-left: 2rem } }"
        ".bd-main .bd-content .bd-article-container .bd-article { padding: 1rem }"
    )
    head = f"<style>{theme}{style.read_text('utf-8')}</style>"
    tab.set_content(pdf.FRAME.format(title="", head=head, body="<h2>Title</h2>"))
    tab.emulate_media(media="print")
    box = tab.locator("article").bounding_box()
    assert (box["x"], box["width"]) == (0, pdf.WIDTH)
    inner = "e => e.clientWidth - parseFloat(getComputedStyle(e).paddingLeft) * 2"
    assert tab.locator("article").evaluate(inner) == pdf.WIDTH
    heading = "e => [getComputedStyle(e).breakAfter, getComputedStyle(e).breakInside]"
    assert tab.locator("h2").evaluate(heading) == ["avoid", "avoid"]
    tab.close()


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
