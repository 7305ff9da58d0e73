"""What `page_checks.py` asserts, of the first, third, fifth ... page."""

from __future__ import annotations

from page_checks import *  # noqa: F403 (the tests, their mark and their fixtures)
from visits import PAGES, the_visit

visit = the_visit(PAGES[0::2])
