"""The outputs of a chapter are kept until something that it needs has changed."""

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
from plotting import draw, recorded
from diffussm.beta import b
from tools import pen
recorded("speed"), open("studies")
```
"""
FILES = {
    "requirements.txt": "numpy==1\n",
    "book/plotting.py": "import ink\n",
    "book/ink.py": "",
    "book/unused.py": "",
    "diffussm/alpha.py": "",  # its own module, which its cells are
    "diffussm/beta.py": "from diffussm.gamma import g\n",
    "diffussm/gamma.py": "open('weights')",
    "diffussm/weights/small/model.safetensors": "1",
    "diffussm/configs/large.yaml": "",
    "benchmarks/results/speed.json": "{}",
    "benchmarks/results/size.json": "{}",
    "studies/results/quick.jsonl": "",
    "diffussm/delta.py": "",
    "tools/pen.py": "",
}
NOT_NEEDED = (
    "book/unused.py",
    "diffussm/alpha.py",
    "diffussm/delta.py",
    "diffussm/configs/large.yaml",
    "benchmarks/results/size.json",
)


@pytest.mark.parametrize("changed", FILES)
def test_what_a_chapter_needs_is_in_its_fingerprint(
    changed: str, tmp_path: Path
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    path = tmp_path / "book" / "01_alpha.md"
    path.write_text(CELLS)
    chapter = read_chapter(path, tmp_path)
    before = fingerprint(chapter, tmp_path)
    assert before == fingerprint(chapter, tmp_path)
    (tmp_path / changed).write_text("changed = 1\n")
    assert (fingerprint(chapter, tmp_path) == before) == (changed in NOT_NEEDED)
