"""What stands around the chapters: icons, heads of pages, the front door.

What needs the rendered book reads its files, without a browser.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from browsers import absent
from docutils import nodes
from docutils.core import publish_doctree
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pybtex.database import parse_string
from sphinx.application import Sphinx
from sphinx.config import Config

from tools.book import ROOT, reading_order

sys.path.insert(0, str(ROOT / "book" / "_ext"))

import accessible
import api_reference
import buttons
import citation
import index_entries
import page_head
import previews

from tools.overview import parts, path

HTML = ROOT / "_build" / "html"
STATIC = ROOT / "book" / "_static"


class Page(HTMLParser):
    """A rendered page: its tags with their attributes, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def meta(self, name: str) -> list[str]:
        return [
            m["content"]
            for m in self.all("meta")
            if name in (m.get("name"), m.get("property"))
        ]


@pytest.fixture(scope="session")
def pages() -> dict[str, Page]:
    """The rendered book, by the pages' names; `index`, `404` and the others too."""
    for page in reading_order():
        if not (HTML / f"{page}.html").exists():
            absent(
                f"{page}.html is not built: run `make book`", "DIFFUSSM_REQUIRE_BOOK"
            )
    return {
        str(path.relative_to(HTML).with_suffix("")): Page(path)
        for path in [*HTML.glob("*.html"), *HTML.glob("book/*.html")]
    }


def described(text: str) -> str:
    return page_head.describe(publish_doctree(text))


def test_description_is_the_first_sentences_without_formulas() -> None:
    assert (
        described("Why?\n\nIt is so. And :math:`x` too. Yes.") == "Why? It is so. Yes."
    )
    assert described("") == ""
    long = described("word " * 100)
    assert len(long) <= page_head.LENGTH + 2 and long.endswith("word …")


def test_card_shows_what_was_drawn() -> None:
    card = page_head.draw_card("a b", ROOT / "book" / "figures" / "samples.png")
    assert card.size == (1200, 630)
    grey = card.convert("L")
    assert grey.crop((700, 0, 1200, 630)).getextrema() == (0, 255)
    assert grey.crop((0, 0, 600, 140)).getextrema()[1] < 50
    assert grey.crop((0, 140, 600, 630)).getextrema()[1] > 200


@pytest.mark.end_to_end
def test_every_icon_has_a_drawing(pages: dict[str, Page]) -> None:
    drawn = set(re.findall(r"\.(fa-[\w-]+) \{", (STATIC / "icons.css").read_text()))
    plain = {"fa-solid", "fa-lg", "fa-brands"}
    for name, page in pages.items():
        used = set(re.findall(r"(?<=[\" ])fa-[\w-]+", page.text)) - plain
        assert used <= drawn, f"{name}: {used - drawn}"
        assert "vendor/fontawesome" not in page.text, name
    assert not (HTML / "_static" / "vendor").exists()


@pytest.mark.end_to_end
def test_mathjax_is_loaded_where_there_is_mathematics(pages: dict[str, Page]) -> None:
    loaded = {name for name, page in pages.items() if "mathjax/" in page.text}
    assert loaded == {name for name, p in pages.items() if 'class="math ' in p.text}
    assert "book/index" not in loaded and "book/notation" in loaded


@pytest.mark.end_to_end
def test_heads_say_what_a_page_is(pages: dict[str, Page]) -> None:
    titles: dict[str, str] = {}
    for name in [*reading_order(), *page_head.MADE]:
        page = pages[name]
        assert len(page.meta("viewport")) == 1, name
        (title,) = re.findall(r"<title>(.*?)</title>", page.text)
        assert title.count("Diffusion without attention") == 1, title
        assert titles.setdefault(title, name) == name
        assert page.meta("og:title") == [title.replace("&amp;", "&")]
        assert page.meta("description") == page.meta("og:description") != [""], name
        (said,) = page.meta("description")
        assert "\\" not in said and len(said) <= page_head.LENGTH + 2, said
        assert said[0].isalnum() or said[0] in "“‘*", said
        assert not re.search(r"<h1>\s*</h1>", page.text), (
            f"{name}: printed without title"
        )
        (card,) = page.meta("og:image")
        assert (HTML / name).parent.joinpath(card).is_file()


@pytest.mark.end_to_end
def test_front_door_and_lost_pages_lead_on(pages: dict[str, Page]) -> None:
    for name in ("index", "404"):
        page = pages[name]
        assert re.search(r"<title>[^<]+</title>", page.text)
        assert page.meta("og:title")[0] and page.meta("description")[0]
        (link,) = page.all("a")
        assert (HTML / link["href"]).is_file() and "<script" not in page.text
    assert "0; url=book/index.html" in pages["index"].text
    assert "refresh" not in pages["404"].text


@pytest.mark.end_to_end
def test_pages_are_light(pages: dict[str, Page]) -> None:
    """A page and all that it loads, less its pictures: two megabytes."""
    for name in reading_order():
        page = pages[name]
        files = [s["src"] for s in page.all("script") if "src" in s]
        files += [x["href"] for x in page.all("link") if x.get("rel") == "stylesheet"]
        if "mathjax/startup.js" in page.text:  # which loads the others
            parts_of_it = (
                "core",
                "input/tex",
                "output/chtml",
                "output/chtml/fonts/tex",
            )
            files += [f"../_static/mathjax/{part}.js" for part in parts_of_it]
        here = (HTML / name).parent
        size = len(re.sub(r"data:[^\"]*", "", page.text)) + sum(
            (here / file.partition("?")[0]).stat().st_size for file in files
        )
        assert size < 2_000_000, f"{name}: {size / 1e6:.2f} MB"


def test_pages_are_read_again_when_what_makes_them_has_changed(tmp_path: Path) -> None:
    (tmp_path / "book" / "_ext").mkdir(parents=True)
    (tmp_path / "index.rst").write_text("A page\n======\n")
    built = tmp_path / "_build"

    def pages_read() -> list[str]:
        settings = {"extensions": ["outdated"]}
        app = Sphinx(tmp_path, None, built, built, "dummy", settings, status=None)
        read: list[str] = []
        app.connect("source-read", lambda app, page, source: read.append(page))
        app.build()
        return read

    assert pages_read() == ["index"]
    assert pages_read() == []
    (tmp_path / "book" / "_ext" / "badge.py").write_text("colour = 'blue'\n")
    assert pages_read() == ["index"]


def test_full_stop_after_a_formula_stays_on_its_line() -> None:
    formula = r'<span class="math notranslate nohighlight">\(x &lt; y\)</span>'
    context = {"body": f"<p>If {formula}, or {formula} else {formula}?)</p>"}
    accessible.mend(Any, "page", "page.html", context, None)
    held = '<span class="unbroken">' + formula
    assert (
        context["body"] == f"<p>If {held},</span> or {formula} else {held}?)</span></p>"
    )


def test_an_option_in_an_output_is_not_torn_behind_its_hyphens() -> None:
    printed = "<pre title=' --b'>an --c_d 1e-4 &#39;--g.h&#39;</pre>"
    printed = f'<div class="output x highlight-y">{printed}'
    kept = printed
    for word in ("--c_d", "1e-4", "--g.h"):
        kept = kept.replace(word, f'<span class="unbroken">{word}</span>')
    script = '<div class="output text_html"><script>[0, 1e-6]</script>'
    body, wanted = (f"<p>--a</p>{script}{x}<p>or --f" for x in (printed, kept))
    assert accessible.keep_hyphened(body) == wanted


def test_path_names_every_part_and_every_chapter() -> None:
    shown = [*parts(), *parts(numbered=False)]
    text = path({caption: "Why." for caption, _ in shown})
    assert text.count(":::{container} part") == len(shown)
    links = re.findall(r"^(?:(\d+)\.|-) \{ref\}`([\w-]+)`$", text, re.MULTILINE)
    assert len(links) == sum(len(chapters) for _, chapters in shown)
    assert len({label for _, label in links}) == len(links)
    numbers = [int(number) for number, _ in links if number]
    assert numbers == list(range(1, sum(len(c) for _, c in parts()) + 1))
    with pytest.raises(ValueError, match="Speed"):
        path({caption: "" for caption, _ in shown if caption != "Speed"})


def test_docstrings_become_lists() -> None:
    text = "Do it.\n\nArgs:\n    x: the first,\n        and more.\n    *y: the rest."
    assert api_reference.markdown(text).splitlines() == [
        "Do it.",
        "",
        "",
        "**Args**",
        "",
        "- `x`: the first,",
        "  and more.",
        "- `*y`: the rest.",
    ]


def test_labels_in_docstrings_become_references() -> None:
    text = "Source: eq-a-b (fig-a-b), eq-none, `eq-a-b`, seq-a-b."
    assert api_reference.linked(text, {"eq-a-b", "fig-a-b"}) == (
        "Source: {eq}`eq-a-b` ({numref}`fig-a-b`), eq-none, `eq-a-b`, seq-a-b."
    )
    text = "The mean (equation eq-a-b), so (eq-a-b); (eq-none)."
    assert api_reference.linked(text, {"eq-a-b"}) == (
        "The mean {eq}`eq-a-b`, so {eq}`eq-a-b`; (eq-none)."
    )


def parsed(source: str) -> list[api_reference.Definition]:
    """The functions and classes that a text defines."""
    body = ast.parse(source).body
    return [node for node in body if isinstance(node, api_reference.Definition)]


def test_signatures_are_those_of_the_code() -> None:
    source = (
        "@dataclass(frozen=True)\nclass A:\n    x: int\n    y: str = 'a'\n\n"
        "class B:\n    def __init__(self, n: int) -> None: ...\n\n"
        "def f(x: 'A', *, n=3) -> list[int]: ..."
    )
    said = list(map(api_reference.signature, parsed(source)))
    assert said == ["(x: int, y: str = 'a')", "(n: int)", "(x: A, *, n=3) -> list[int]"]
    source = (
        "class A(NamedTuple):\n    x: int\n\n"
        "@contextmanager\ndef f() -> Iterator[int]: ..."
    )
    said = list(map(api_reference.signature, parsed(source)))
    assert said == ["(x: int)", "() -> AbstractContextManager[int]"]
    cell = "@method_of(A)\ndef g(self): ...\n\ndef _h(): ...\n\nclass C: ..."
    assert api_reference.definitions(cell) == ["C"]


def test_a_property_has_its_type() -> None:
    source = (
        "class A:\n    @cached_property\n"
        "    def n(self) -> int:\n        'How (a) -> (b).'\n"
    )
    (a,) = parsed(source)
    text = api_reference.entry(a)
    assert "{py:property} n\n:type: int\n\nHow (a) → (b).\n" in text


def test_a_class_that_takes_what_its_base_takes_names_it() -> None:
    bad, good = parsed(
        'class Bad(OSError):\n    "B."\n'
        'class Good(OSError):\n    "G."\n    def __init__(self, x: int): pass'
    )
    assert "Base: `OSError`" in api_reference.entry(bad)
    assert "Base" not in api_reference.entry(good)


def test_constants_and_types_are_shown_with_what_a_comment_says() -> None:
    source = (
        "N = 3  # how many\nM = 4\nT = TypeVar('T')\nFILE = 'a-05 b'\n"
        "Walk = Callable[['Tensor'], int]\nLONG: dict[str, int] = {  # 'a' is # one\n"
        + "".join(f"    'key{k}': {k},\n" for k in range(20))
        + "}\nx.y = 3\n"
    )
    names = ["N", "T", "FILE", "Walk", "LONG", "y"]
    said = api_reference.remarks(source)
    shown = [api_reference.constant(n, names, said) for n in ast.parse(source).body]
    assert shown == [
        "````{py:data} N\n:value: 3\n\nHow many\n````",
        "",
        "",
        "````{py:data} FILE\n:value: 'a-05 b'\n\n\n````",
        "````{py:data} Walk\n:value: Callable[[Tensor], int]\n\n\n````",
        "````{py:data} LONG\n:type: dict[str, int]\n\n'a' is # one\n````",
        "",
    ]


def test_signatures_show_the_defaults_that_a_caller_gets(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("WHITE = (255, 255)\nblack = 0\n")
    (tmp_path / "a.py").write_text(
        "from diffussm.b import WHITE\n_Part = str | int\nT = TypeVar('T')\n"
        "_BEST = A(n=1)\n_LONG = '" + 60 * "x" + "'\n\n"
        "@dataclass\nclass A:\n    m: float = bounded(MISSING, above=0)\n"
        "    n: int = bounded(2, least=1)\n    k: dict = field(default_factory=dict)\n"
        "    c: Literal['T'] | Sequence['B'] = 'a'\n\n"
        "def f(a: _Part, b=_BEST, c=WHITE, d=_LONG) -> tuple[T, 'B']: ..."
    )
    values = api_reference.constants(tmp_path / "a.py")
    a, f = parsed((tmp_path / "a.py").read_text())
    assert api_reference.signature(a, values) == (
        "(m: float, n: int = 2, k: dict = {}, c: Literal['T'] | Sequence[B] = 'a')"
    )
    assert api_reference.signature(f, values) == (
        "(a: str | int, b=A(n=1), c=(255, 255), d=_LONG) -> tuple[T, B]"
    )


def test_long_names_may_break_and_are_copied_whole() -> None:
    name = nodes.literal("", "", nodes.Text("diffussm.fft_convolution"))
    api_reference.with_breaks(name)
    assert name.astext() == "diffussm.fft_convolution"
    assert [one.astext() for one in name.findall(nodes.Text)] == [
        "diffussm.",
        "fft_",
        "convolution",
    ]
    assert sum(isinstance(one, api_reference.Break) for one in name.children) == 2


def test_one_cell_of_the_notation_may_have_several_symbols() -> None:
    assert previews.COMMA.split("u(t), u_k") == ["u(t)", "u_k"]
    assert previews.COMMA.split("f(a, b)") == ["f(a, b)"]


@pytest.mark.parametrize("url", ["", "https://github.com/o/r/"])
def test_repository_has_a_button_when_there_is_an_address(url: str) -> None:
    config = Config({}, {"html_theme_options": {"repository_url": url}})
    config.add("html_theme_options", {}, "html", ())
    buttons.show_repository(None, config)  # type: ignore[arg-type]
    assert config.html_theme_options["use_repository_button"] is bool(url)


def test_binder_and_colab_open_the_page_of_a_repository_on_github() -> None:
    page, notebook = "book/11_state_space", "notebooks/11_state_space.ipynb"
    binder, colab = buttons.launchers("https://github.com/o/r/", "", page, notebook)
    assert binder["url"] == (
        "https://mybinder.org/v2/gh/o/r/main?urlpath=lab/tree/book/11_state_space.md"
    )
    assert colab["url"] == (
        "https://colab.research.google.com/github/o/r/blob/notebooks/"
        "notebooks/11_state_space.ipynb"
    )
    assert buttons.launchers("https://example.org/o/r", "", page, notebook) == []


@pytest.mark.parametrize(
    ("base", "url", "address"),
    [
        ("", "", ""),
        ("", "https://github.com/Owner/name/", "https://owner.github.io/name/"),
        ("", "https://github.com/o/o.github.io", "https://o.github.io/"),
        ("", "https://example.org/o/name", ""),
        ("https://book.org", "https://github.com/o/name", "https://book.org/"),
    ],
)
def test_picture_of_a_shared_link_has_a_whole_address_if_there_is_one(
    base: str, url: str, address: str
) -> None:
    config = Config({}, {"html_baseurl": base, "html_title": "A book"})
    config.add("html_baseurl", "", "html", ())
    config.add("html_title", "", "html", ())
    config.add("html_theme_options", {"repository_url": url}, "html", ())
    app: Any = SimpleNamespace(config=config)
    page_head.set_address(app, config)
    context: dict[str, Any] = {"title": "A", "pathto": lambda file, _: f"../{file}"}
    page_head.add_head(app, "book/a", "page.html", context, None)
    assert context["card"] == (address or "../") + page_head.CARD


# --- where the chapters run elsewhere ---


def test_colab_finds_what_the_workflow_publishes(tmp_path: Path) -> None:
    """Its step is run here, with a folder for GitHub; the button's path is there."""
    here, there = tmp_path / "here", tmp_path / "there"
    built = here / "_build" / "html" / buttons.FOLDER
    built.mkdir(parents=True)
    (built / "11_state_space.ipynb").write_text("{}")
    (here / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (here / "README.md").write_text("The book.")

    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"]["contents"] == "write"
    (job,) = workflow["jobs"].values()
    step = next(one for one in job["steps"] if one.get("name") == "notebooks")
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    env = os.environ | alone | step["env"]

    def run(*command: str, folder: Path = here) -> str:
        told = {"cwd": folder, "env": env, "text": True, "capture_output": True}
        done = subprocess.run(command, check=False, **told)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    run("git", "init", "--quiet", "--bare", str(there), folder=tmp_path)
    run("git", "init", "--quiet")
    run("git", "remote", "add", "origin", str(there))
    run("git", "add", ".")
    run("git", "commit", "--quiet", "-m", "The text")
    for _ in range(2):  # and again, with the next build
        run("bash", "-e", "-c", step["run"])
    _, colab = buttons.launchers(
        "https://github.com/o/r", "", "book/11", "notebooks/11_state_space.ipynb"
    )
    branch, _, file = colab["url"].partition("/blob/")[2].partition("/")
    listed = run("git", "ls-tree", "-r", "--name-only", branch, folder=there)
    assert listed.split() == [file]
    assert run("git", "status", "--porcelain") == ""


BINDER = ROOT / ".binder"


def test_binder_installs_the_package_for_a_cpu() -> None:
    lines = (BINDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if not line.startswith("#")]
    options = dict(line.split() for line in said if line.startswith("--"))
    assert options["--extra-index-url"].endswith("/whl/cpu")
    pins = (BINDER / options["--constraint"]).resolve()
    assert pins == ROOT / "requirements.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    place, _, extras = options["--editable"].partition("[")
    assert place == "." and extras.strip("]") in project["optional-dependencies"]
    # A pin of another build of torch, such as +cu130, would not fit the index.
    pinned = dict.fromkeys(re.findall(r"^([\w.-]+)==", pins.read_text(), re.MULTILINE))
    for line in said:
        if not line.startswith("--"):
            assert Requirement(line).name in pinned
    assert re.search(r"^torch==[\d.]+$", pins.read_text(), re.MULTILINE)
    python = (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.99")


@pytest.mark.slow
def test_binder_starts_jupyter_with_the_settings_of_make_lab(tmp_path: Path) -> None:
    said = "from jupyter_core.paths import jupyter_config_path as p; print(p()[0])"
    command = [BINDER / "start", sys.executable, "-c", said]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER_")}
    told = {"cwd": tmp_path, "env": kept, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **told)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / ".jupyter"
    assert '"$(CURDIR)/.jupyter"' in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def texts(pages: dict[str, Page]) -> dict[str, dict[str, str]]:
    script = (HTML / "_static" / "previews.js").read_text(encoding="utf-8")
    said = re.fullmatch(r"window\.PREVIEWS = (.*);\n", script)
    assert said
    return dict(json.loads(said[1]))


@pytest.mark.end_to_end
def test_what_a_page_refers_to_has_a_preview(
    pages: dict[str, Page], texts: dict[str, dict[str, str]]
) -> None:
    """Whatever has a number, a term, a source or a signature."""
    kinds = re.compile(r"#(equation-|fig-|tab-|term-|diffussm\.)")
    for name in reading_order():
        for link in pages[name].all("a"):
            if link.get("class") != "reference internal":
                continue
            address, mark, anchor = link["href"].partition("#")
            target = f"book/{address}" if address else f"{name}.html"
            if kinds.match(mark + anchor):
                assert texts["targets"].get(f"{target}#{anchor}"), f"{name}: {link}"
    for target, text in texts["targets"].items():
        if "#fig-" in target:
            shown = re.findall(r'<img [^>]*src="\.\./([^"]+)"', text)
            # What a cell writes as Markdown, a part of a model card, has no picture.
            assert shown or "<table" in text, target
            assert all((HTML / file).is_file() for file in shown), target
    assert {"L", "M", "u_k"} <= set(texts["symbols"])


def written(tree: ast.Module) -> set[str]:
    """What a module defines or assigns, type variables left out."""
    names = {n.name for n in tree.body if isinstance(n, api_reference.Definition)}
    for node in tree.body:
        match node:
            case ast.Assign(value=ast.Call(func=ast.Name("TypeVar"))):
                pass
            case ast.Assign(targets=[ast.Name(name)]):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(name)):
                names.add(name)
    return names


@pytest.mark.end_to_end
def test_reference_has_every_public_name(pages: dict[str, Page]) -> None:
    anchors = {a["id"] for _, a in pages["book/api"].tags if "id" in a}
    index = pages["genindex"].text
    for file in (ROOT / "diffussm").glob("[a-z]*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        public = api_reference.public(tree)
        for name in written(tree) & set(public):
            assert f"diffussm.{file.stem}.{name}" in anchors
            assert f"#diffussm.{file.stem}.{name}" in index


@pytest.mark.end_to_end
def test_badges_and_reference_lead_to_each_other(pages: dict[str, Page]) -> None:
    for link in pages["book/api"].all("a"):
        if "api-chapter" in link.get("class", ""):
            page, _, anchor = link["href"].partition(".html#")
            assert f'id="{anchor}"' in pages[f"book/{page}"].text, link["href"]
    for name, page in pages.items():
        for anchor in re.findall(r'href="api\.html#([\w-]+)"', page.text):
            assert f'id="{anchor}"' in pages["book/api"].text, f"{name}: {anchor}"


@pytest.fixture
def tab(browser: Any, pages: dict[str, Page]) -> Iterator[Any]:
    """A chapter, opened as a file."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.complaints = []
    tab.on(
        "console", lambda m: tab.complaints.append(m.text) if m.type == "error" else 0
    )
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.goto((HTML / "book" / "13_bidirectional.html").as_uri())
    tab.evaluate("() => MathJax.startup.promise")
    yield tab
    assert tab.complaints == []
    tab.close()


@pytest.mark.end_to_end
def test_search_in_files_finds_and_asks_for_nothing_else(tab: Any) -> None:
    tab.goto((HTML / "search.html").as_uri() + "?q=state")
    tab.locator("#search-results li a").first.wait_for()
    tab.wait_for_function(
        "/found/.test(document.querySelector('.search-summary')?.textContent)"
    )


@pytest.mark.end_to_end
def test_preview_opens_for_mouse_and_keyboard_and_escape_closes_it(tab: Any) -> None:
    box = tab.locator("#preview")
    link = tab.locator("article a.reference[href*='#equation-eq-bidirectional']").first
    link.hover()
    box.locator("mjx-container").wait_for()
    assert link.get_attribute("aria-describedby") == "preview"
    box.hover()
    tab.wait_for_timeout(500)
    assert box.is_visible(), "one may go into it"
    tab.keyboard.press("Escape")
    assert box.is_hidden() and link.get_attribute("aria-describedby") is None
    figure = tab.locator("article a.reference[href*='#fig-bidirectional']").first
    figure.scroll_into_view_if_needed()
    tab.keyboard.press("Tab")  # the focus is where the keyboard has put it
    figure.focus()
    box.locator("img.only-light").wait_for()
    assert (
        box.locator("img.only-light").evaluate(
            "e => e.decode().then(() => e.naturalWidth)"
        )
        > 0
    )
    symbol = tab.locator("article p mjx-container").first
    symbol.hover()
    tab.wait_for_function(
        "document.querySelector('#preview').innerText.includes('lag')"
    )


@pytest.mark.end_to_end
def test_chapters_can_be_downloaded_as_notebooks(pages: dict[str, Page]) -> None:
    """Each that has code, but for the one that works on the checkout."""
    for name in reading_order():
        links = [
            a["href"] for a in pages[name].all("a") if "ipynb" in a.get("href", "")
        ]
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        has_one = "{code-cell}" in text and name != "book/04_package"
        assert len(links) == has_one, name
        for link in links:
            file = (HTML / name).parent / link
            whole = json.loads(file.read_text(encoding="utf-8"))
            assert any(cell["cell_type"] == "code" for cell in whole["cells"]), link


@pytest.mark.end_to_end
def test_index_lists_symbols_and_sources(pages: dict[str, Page]) -> None:
    index = pages["genindex"].text
    for symbol in (
        "L (positions of the sequence, HW)",
        "β_t (variance added at step t)",
    ):
        assert "notation.html#tab-notation-" in index and f">{symbol}</a>" in index
    cited = [
        x["id"]
        for _, x in pages["book/bibliography"].tags
        if x.get("class") == "citation"
    ]
    assert cited and all(f'bibliography.html#{one}"' in index for one in cited)


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (r"\bar\alpha_t", "ᾱ_t"),
        (r"\overline A, \overline B", "Ā, B̄"),
        (r"\mathbf W^\uparrow", "W^↑"),
        (r"\Delta", "Δ"),
        ("u(t), u_k", "u(t), u_k"),
    ],
)
def test_a_symbol_can_be_read_in_the_index(formula: str, text: str) -> None:
    assert index_entries.plain(formula) == text


# --- how to cite, and who wrote it ---


def test_bibtex_says_what_the_citation_file_says() -> None:
    file = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    read = parse_string(
        citation.entries(ROOT, "2026", "https://a.b/c"), "bibtex"
    ).entries
    for key, work in (
        ("diffussm", file["preferred-citation"]),
        ("diffussm-book", file),
    ):
        fields, people = read[key].fields, read[key].persons["author"]
        assert fields["title"] == work["title"]
        assert fields.get("doi") == work.get("doi")
        names = [a.get("name") or a["family-names"] for a in work["authors"]]
        assert [" ".join(p.last_names).strip("{}") for p in people] == names
    assert read["diffussm"].fields["year"] == str(file["preferred-citation"]["year"])
    assert read["diffussm-book"].fields["url"] == "https://a.b/c"
    assert "url" not in citation.entries(ROOT, "2026")


@pytest.mark.end_to_end
def test_front_page_shows_how_to_cite(pages: dict[str, Page]) -> None:
    shown = re.sub(r"<[^>]*>", "", pages["book/index"].text)
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    url = settings["repository"]["url"]
    assert citation.entries(ROOT, settings["copyright"], url) in shown


def test_the_author_has_one_name() -> None:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    file = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    authors = project["project"]["authors"]
    assert file["authors"] == authors == [{"name": settings["author"]}]
