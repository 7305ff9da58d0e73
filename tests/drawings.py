"""What a block diagram of the book says: its maps, their sizes, their activations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from tools.book import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Drawn:
    """A box with parameters: its label, its line of sizes, whether a sigma follows."""

    label: str
    sizes: str
    sigma: bool

    def widths(self, **letters: int) -> list[int]:
        """The numbers of the line `D → 2D`, for these values of its letters."""
        return [_value(term, letters) for term in self.sizes.split(" → ")]


def _value(term: str, letters: dict[str, int]) -> int:
    """`2D/M` or `MP²C`: a product of numbers and letters, or a quotient."""
    above, _, below = term.partition("/")
    product = 1
    for factor, square in re.findall(r"(\d+|[A-Z])(²?)", above):
        number = int(factor) if factor.isdigit() else letters[factor]
        product *= number ** (2 if square else 1)
    return product // (letters[below] if below else 1)


def drawn(name: str) -> dict[str, Drawn]:
    """The boxes with parameters of `book/figures/<name>.svg`, by their module."""
    boxes = {}
    for group in ElementTree.parse(ROOT / "book" / "figures" / name).iter(f"{SVG}g"):
        if module := group.get("data-module"):
            texts = ["".join(t.itertext()) for t in group.iter(f"{SVG}text")]
            sizes = [t for t in texts if "→ " in t]
            label = next(t for t in texts if t not in (*sizes, "σ"))
            assert module not in boxes, f"{module} stands there twice"
            boxes[module] = Drawn(label, sizes[0] if sizes else "", "σ" in texts)
    return boxes
