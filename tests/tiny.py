"""A small run for the tests: its options, and what is asked of its folder."""

import hashlib
import json
from dataclasses import fields, replace

import torch
from PIL import Image

from diffussm.folders import ImageFolder
from diffussm.model import DiffuSSMConfig
from diffussm.options import Execution, Recipe
from diffussm.runs import train

TINY = Recipe(
    model=DiffuSSMConfig(
        input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=1, d_state=4
    ),
    batch_size=8,
    steps=10,
    lr=1e-3,
)
SELDOM = Execution(log_every=4, save_every=100)


def changed(changes):
    """TINY and SELDOM with these options, whichever of the two they belong to."""
    names = {field.name for field in fields(Execution)}
    recipe = {key: value for key, value in changes.items() if key not in names}
    execution = {key: value for key, value in changes.items() if key in names}
    return replace(TINY, **recipe), replace(SELDOM, **execution)


def run_tiny(folder, **changes):
    recipe, execution = changed(changes)
    images = None
    if recipe.data != "digits":
        images = ImageFolder(recipe.data, recipe.model.height)
    return train(recipe, folder, execution, "cpu", progress=False, dataset=images)


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second", "seconds_left", "data_wait")
    times += ("work_seconds_fastest", "work_seconds_slowest", "slowest_process")
    return [
        {key: value for key, value in line.items() if key not in times}
        for line in lines
    ]


def assert_same_state(a, b):
    assert a.step == b.step
    for first, second in ((a.model, b.model), (a.ema, b.ema)):
        for (name, p), (_, q) in zip(
            first.named_parameters(), second.named_parameters(), strict=True
        ):
            assert torch.equal(p, q), name
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        for slot, value in a.optimizer.state[p].items():
            assert torch.equal(value, b.optimizer.state[q][slot]), slot


def reseal(checkpoint):
    """Make the checksums of a checkpoint fit what lies in it, as an attacker would."""
    record = json.loads((checkpoint / "state.json").read_text())
    for name in record["sha256"]:
        record["sha256"][name] = hashlib.sha256(
            (checkpoint / name).read_bytes()
        ).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(record))


def steps_kept(run):
    return [
        int(folder.name.removeprefix("step_"))
        for folder in sorted((run / "checkpoints").iterdir())
    ]


def write_images(folder, seed, count=8):
    for i in range(count):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image = torch.randint(
            256, (8, 8), generator=torch.Generator().manual_seed(100 * seed + i)
        )
        Image.fromarray(image.byte().numpy()).save(
            folder / str(i % 2) / f"of_{seed}_{i}.png"
        )
    return str(folder)
