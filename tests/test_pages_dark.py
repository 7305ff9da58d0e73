"""Every page of the rendered book in the dark theme, on a desktop and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from visits import PAGES, Visit, book, server, visit_page  # noqa: F401

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="session")
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context(color_scheme="dark", reduced_motion="reduce")
    yield context
    context.close()


@pytest.fixture(scope="session", params=PAGES, ids=lambda page: page.split("/")[-1])
def visit(request: pytest.FixtureRequest, context: Any, server: str) -> Iterator[Visit]:  # noqa: F811
    visit = visit_page(context, server, request.param)
    assert visit.tab.evaluate("document.documentElement.dataset.theme") == "dark"
    yield visit
    visit.tab.close()


def test_nothing_is_light_in_the_dark(visit: Visit) -> None:
    visit.resize(1280)
    assert visit.faults("slabs", "codeContrast") == []


def test_a_phone_shows_all_of_it(visit: Visit) -> None:
    """The page does not move sideways; what does shows it and can be reached."""
    visit.resize(390)
    assert visit.faults("body", "equations", "silentScrollers") == []


def test_figures_can_be_read_on_a_phone(visit: Visit) -> None:
    visit.resize(390)
    assert visit.faults("smallText") == []


def test_axe_finds_nothing_grave_on_a_phone(visit: Visit) -> None:
    visit.resize(390)
    assert visit.violations() == []


def test_console_is_silent_and_no_other_host_is_asked(visit: Visit) -> None:
    assert visit.complaints == []
    assert visit.elsewhere == []
