"""The oldest versions that pyproject.toml allows, as constraints for pip.

``python -m tools.oldest > oldest.txt; pip install -c oldest.txt -e ".[book]"``: then
the fast tests say whether the lower bounds are true. It needs nothing that is not
Python's own.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

__all__ = ["oldest"]

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def oldest(project: Path = PROJECT) -> list[str]:
    """`name==version` for each lower bound of the package and its extras for users."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    found = []
    for requirement in (*table["dependencies"], *extras["data"], *extras["full"]):
        bound = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement)
        if bound is None:
            raise ValueError(
                f"{requirement}: expected a lower bound, such as numpy>=1.26"
            )
        found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(oldest()))
