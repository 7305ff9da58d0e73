"""The outputs of a chapter are kept until something that it imports has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.book import read_chapter
from tools.cache import fingerprint

CELLS = """\
---
module: alpha
---

# Alpha

```{code-cell}
from plotting import draw
from diffussm.beta import b
from tools import pen
```
"""
FILES = {
    "requirements.txt": "numpy==1\n",
    "book/plotting.py": "import ink\n",
    "book/ink.py": "",
    "book/unused.py": "",
    "diffussm/alpha.py": "",  # its own module, which its cells are
    "diffussm/beta.py": "from diffussm.gamma import g\n",
    "diffussm/gamma.py": "",
    "diffussm/delta.py": "",
    "tools/pen.py": "",
}


@pytest.mark.parametrize("changed", FILES)
def test_what_a_chapter_imports_is_in_its_fingerprint(
    changed: str, tmp_path: Path
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    path = tmp_path / "book" / "01_alpha.md"
    path.write_text(CELLS)
    chapter = read_chapter(path, tmp_path)
    before = fingerprint(chapter, tmp_path)
    assert before == fingerprint(chapter, tmp_path)
    (tmp_path / changed).write_text("changed = 1\n")
    same = ("book/unused.py", "diffussm/alpha.py", "diffussm/delta.py")
    assert (fingerprint(chapter, tmp_path) == before) == (changed in same)
