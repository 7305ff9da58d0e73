"""A cheap extractor and images to be scored, for the tests."""

import numpy as np
import torch
from PIL import Image


class Colours:
    """Ten numbers of each image: a cheap extractor whose features are known."""

    name, checksum = "colours", "0"

    def __call__(self, images):
        x = images.double() / 255
        pool = torch.cat(
            [x.mean((2, 3)), x.std((2, 3)), x[:, :, 0, 0], x[:, :1, 1, 1]], dim=1
        )
        return {"pool": pool, "spatial": x[:, 0].flatten(1)[:, :8], "logits": pool * 5}


def some(n, seed=0, size=4):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size=(n, size, size, 3), dtype=np.uint8)


def batches(images, size=7):
    return list(torch.from_numpy(images).permute(0, 3, 1, 2).split(size))


def odd_images(folder):
    """Files that readers disagree about; returns those to be trained on."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    Image.fromarray((rng.random((16, 16)) * 65535).astype(np.uint16)).save(
        folder / "16 bits.png"
    )
    transparent = np.zeros((16, 16, 4), np.uint8)
    transparent[4:12, 4:12] = (200, 30, 30, 255)
    Image.fromarray(transparent).save(folder / "transparent.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(some(1, 6, 16)[0]).save(folder / "turned.PNG", exif=turned)
    Image.fromarray(some(1, 7, 16)[0]).convert("P").save(folder / "palette é.gif")
    Image.fromarray(some(1, 8, 16)[0]).save(folder / ".png.png")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (folder / hidden).mkdir()
        Image.fromarray(some(1, 9, 16)[0]).save(folder / hidden / "copy.png")
    Image.fromarray(some(1, 8, 16)[0]).save(folder / "plain.png")
    return sorted(
        p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")
    )


def adm_inception_score(logits, part=5000):
    """As ADM computes it: consecutive parts, the last one short, of equal weight."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    cut = [p[start : start + part] for start in range(0, len(p), part)]
    return np.mean(
        [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in cut]
    )
