"""The oldest versions that pyproject.toml allows, as constraints for pip.

``python -m tools.oldest > oldest.txt; pip install -c oldest.txt -e ".[book]"``: then
the fast tests say whether the lower bounds are true. It needs nothing that is not
Python's own.
"""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

__all__ = ["oldest"]

NOT_FOR_USERS = ("book",)
PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def oldest(project: Path = PROJECT) -> list[str]:
    """`name==version` for each lower bound of the package and its extras for users."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    users = [extras[name] for name in extras if name not in NOT_FOR_USERS]
    found = []
    for requirement in dict.fromkeys(chain(table["dependencies"], *users)):
        bound = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement)
        if bound is None:
            raise ValueError(
                f"{requirement}: expected a lower bound, such as numpy>=1.26"
            )
        found.append(f"{bound[1]}=={bound[2]}")
    names = [one.partition("==")[0] for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)}: expected one lower bound in all extras")
    return found


if __name__ == "__main__":
    print("\n".join(oldest()))
