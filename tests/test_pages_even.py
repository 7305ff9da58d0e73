"""What `page_checks.py` asserts, of the second, fourth, sixth ... page."""

from __future__ import annotations

from page_checks import *  # noqa: F403 (the tests, their mark and their fixtures)
from visits import PAGES, the_visit

visit = the_visit(PAGES[1::2])
