"""Pictures and files for tests: good ones, odd ones and broken ones."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image


def noise_image(width, height, seed=0):
    """Smooth random colours: edges everywhere, but nothing that JPEG would destroy."""
    small = np.random.default_rng(seed).integers(
        0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8
    )
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def png(width, height, body=b""):
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(body)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b))
        for kind, b in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = encoded(noise_image(120, 80), "JPEG", quality=95)
BROKEN = {
    "empty.jpg": (b"", "empty file"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "text.jpg": (b"<html>not found</html>", "not an image"),
    "script.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "not an image",
    ),
    "gigapixel.png": (png(50_000, 50_000), "limit"),
    "large.png": (
        encoded(Image.new("1", (12_000, 12_000)), "PNG"),
        "12000 x 12000 pixels; the limit",
    ),
    "float.tiff": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "no agreed range"),
    "deep.tiff": (encoded(Image.new("I", (8, 8), 1 << 20), "TIFF"), "no agreed range"),
    "no_pixels.png": (png(8, 8), "cannot be decoded"),
}


def write_lsun(root: Path, path: Path) -> Path:
    """The images below `root` as an LMDB, with LSUN's kind of keys: hashes."""
    with (
        lmdb.open(str(path), map_size=1 << 22) as env,
        env.begin(write=True) as writing,
    ):
        for file in sorted(root.glob("*/*.png")):
            key = hashlib.sha1(file.name.encode()).hexdigest().encode()
            writing.put(key, file.read_bytes())
    (path / "lock.mdb").unlink()
    return path
