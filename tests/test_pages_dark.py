"""Every page of the rendered book in the dark theme, on a desktop and on a phone."""

from __future__ import annotations

import pytest
from visits import Visit, the_book, the_server, the_tab, the_visit  # noqa: F401

pytestmark = pytest.mark.end_to_end
THEME = "dark"


def test_nothing_is_light_in_the_dark(visit: Visit) -> None:
    visit.resize(1280)
    assert visit.faults("slabs", "codeContrast") == []


def test_a_phone_shows_all_of_it(visit: Visit) -> None:
    """The page does not move sideways; what does shows it and can be reached."""
    visit.resize(390)
    assert visit.faults("body", "equations", "captions", "silentScrollers") == []


def test_figures_can_be_read_on_a_phone(visit: Visit) -> None:
    visit.resize(390)
    assert visit.faults("smallText") == []


def test_axe_finds_nothing_grave_on_a_phone(visit: Visit) -> None:
    visit.resize(390)
    assert visit.violations() == []


def test_console_is_silent_and_no_other_host_is_asked(visit: Visit) -> None:
    assert visit.complaints == []
    assert visit.elsewhere == []
