"""The second, fourth, sixth ... page of the rendered book, opened in a real browser
over a server on this machine; `page_checks.py` says what must hold.

`make test` builds the book first. A plain `pytest` skips these tests where the book is
not built or is older than its text, or where there is no Chromium;
DIFFUSSM_REQUIRE_BOOK and DIFFUSSM_REQUIRE_BROWSER forbid that.
"""

from __future__ import annotations

import pytest
from page_checks import *  # noqa: F403
from visits import PAGES, the_book, the_server, the_tab, the_visit  # noqa: F401

pytestmark = pytest.mark.end_to_end
visit = the_visit(PAGES[1::2])
