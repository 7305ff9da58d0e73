"""What survives a kill, whatever the number of processes; and what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stores import OPTIONS, SIZE, content, draw_images, make_vae

from diffussm import encoding, files
from diffussm.autoencoder import check_encoder, vae_identity
from diffussm.data import TensorData
from diffussm.encoding import encode, make_plan
from diffussm.folders import ImageFolder
from diffussm.formats import images_from
from diffussm.latents import LatentStore, read_manifest, verify_store

pytestmark = pytest.mark.usefixtures("one_thread")


def test_broken_images_are_left_out_and_named(whole):
    manifest = read_manifest(whole)
    skipped = [name for shard in manifest["shards"] for name, _ in shard["skipped"]]
    assert skipped == ["dogs/004a.png", "dogs/017a.png"]
    assert all(
        "known format" in why
        for shard in manifest["shards"]
        for _, why in shard["skipped"]
    )


def test_shard_without_a_single_good_image_is_empty(vae, tmp_path):
    root = draw_images(tmp_path / "images", 3)
    store = encode(
        ImageFolder(root, SIZE),
        tmp_path / "o",
        vae,
        "t",
        batch_size=2,
        shard_size=1,
        progress=False,
    )
    assert [shard["images"] for shard in store.manifest["shards"]] == [1, 1, 1, 0, 0]
    assert (
        store.moments(torch.tensor([2, 0])).shape == (2, 2, 4, 8, 8)
        and verify_store(tmp_path / "o") == []
    )


def test_file_that_vanished_is_left_out_and_a_disk_that_fails_stops_the_encoding(
    vae, tmp_path, monkeypatch
):
    root = draw_images(tmp_path / "images", 3)
    folder = ImageFolder(root, SIZE)
    (root / "dogs" / "000.png").unlink()
    store = encode(folder, tmp_path / "o", vae, "t", **OPTIONS)
    left_out = {
        name: why
        for shard in store.manifest["shards"]
        for name, why in shard["skipped"]
    }
    assert left_out["dogs/000.png"] == "no longer there" and len(store) == 2

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr("diffussm.images.file_content", failing)
    with pytest.raises(OSError, match="Input/output"):
        encode(folder, tmp_path / "p", vae, "t", **OPTIONS)
    assert not (tmp_path / "p" / "manifest.json").exists()


FORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from stores import OPTIONS, SIZE, make_vae
from diffussm import encoding
from diffussm.folders import ImageFolder

vae = make_vae()  # here: what it imports, each child would import again

def work(root, out, rank, size, fuse):
    plain, events = encoding.moments, 0
    def slowly(*arguments):
        time.sleep(0.01)
        return plain(*arguments)
    def counted(function):
        def call(*arguments):
            nonlocal events
            events += 1
            if events == abs(fuse) and fuse > 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if events == abs(fuse):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    encoding.moments = slowly
    Path.replace, os.fsync = counted(Path.replace), counted(os.fsync)
    images, which = ImageFolder(root, SIZE), dict(rank=rank, world_size=size)
    encoding.encode(images, out, vae, "test", **which, **OPTIONS)

for line in sys.stdin:
    root, out, rank, size, fuse = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        try:
            work(root, out, int(rank), int(size), int(fuse))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forker:
    """Starts encoders that need not import torch first, each with its own fuse."""

    def __init__(self) -> None:
        script = FORKER.format(tests=str(Path(__file__).parent))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self, root: Path, out: Path, rank: int = 0, size: int = 1, fuse: int = 0
    ) -> int:
        self.process.stdin.write(f"{root}\t{out}\t{rank}\t{size}\t{fuse}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=300)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory, vae) -> tuple[Path, dict[str, bytes]]:
    """120 images, and the store of them that ran through."""
    place = tmp_path_factory.mktemp("large")
    root = draw_images(place / "images", 120)
    encode(ImageFolder(root, SIZE), place / "whole", vae, "test", **OPTIONS)
    return root, content(place / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_encode_killed_ten_times_is_byte_identical(forker, large, tmp_path, seed):
    root, expected = large
    rng, out, kills = random.Random(seed), tmp_path / "store", 0
    for attempt in range(10):
        # at a random moment, or just before or after a file is flushed or renamed
        fuse = rng.choice([-1, 1]) * rng.randrange(1, 13) if attempt % 2 else 0
        child = forker.start(root, out, fuse=fuse)
        if not fuse:
            time.sleep(rng.uniform(0.02, 0.15))
            os.kill(child, signal.SIGKILL)
        kills += forker.wait() == -signal.SIGKILL
    assert kills == 10 and not (out / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert done, "nothing was finished before the last kill: the test shows nothing"
    forker.start(root, out)
    assert forker.wait() == 0
    assert content(out) == expected
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items()), (
        "finished shards were redone"
    )


def test_every_single_moment_of_flushing_and_renaming_may_be_the_last(
    forker, root, whole, tmp_path
):
    for fuse in [k if k % 2 else -k for k in range(1, 15)]:
        out = tmp_path / f"store{fuse}"
        forker.start(root, out, fuse=fuse)
        assert forker.wait() == -signal.SIGKILL
        forker.start(root, out)
        assert forker.wait() == 0
        assert content(out) == content(whole)


def test_two_ranks_make_the_bytes_of_one(vae, large, tmp_path):
    root, expected = large
    folder = ImageFolder(root, SIZE)
    assert (
        encode(folder, tmp_path / "o", vae, "test", rank=1, world_size=2, **OPTIONS)
        is None
    )
    with pytest.raises(FileNotFoundError, match="unfinished"):
        LatentStore(tmp_path / "o")
    assert (
        encode(folder, tmp_path / "o", vae, "test", rank=0, world_size=2, **OPTIONS)
        is not None
    )
    assert content(tmp_path / "o") == expected


@pytest.mark.slow
def test_killed_with_three_ranks_and_resumed_with_two_at_once(
    large, forker, vae, tmp_path
):
    root, expected = large
    out = tmp_path / "store"
    for rank in range(3):
        forker.start(root, out, rank, 3, fuse=7)
        assert forker.wait() == -signal.SIGKILL
    other = Forker()
    try:
        forker.start(root, out, 0, 2)
        other.start(root, out, 1, 2)
        assert forker.wait() == other.wait() == 0
    finally:
        other.close()
    assert content(out) == expected


def begin_again_within(monkeypatch, begin) -> None:
    """Let `begin` run in the middle of the first shard, once."""
    plain, left = encoding._encoded, [begin]

    def encoded(*arguments):
        if left:
            left.pop()()
        return plain(*arguments)

    monkeypatch.setattr(encoding, "_encoded", encoded)


def test_second_process_leaves_the_shard_of_a_living_one_alone(
    vae, root, whole, tmp_path, monkeypatch
):
    folder, out = ImageFolder(root, SIZE), tmp_path / "o"
    refused = []

    def again():
        with pytest.raises(ValueError, match=r"making shard 0 of .*o: wait for it"):
            encode(folder, out, vae, "test", **OPTIONS)
        other = {"rank": 1, "world_size": 2}  # has shards of its own
        assert encode(folder, out, vae, "test", **other, **OPTIONS) is None
        refused.append(True)

    begin_again_within(monkeypatch, again)
    assert encode(folder, out, vae, "test", **OPTIONS) is not None and refused
    assert content(out) == content(whole)


def test_draft_that_was_removed_is_told_where_disks_have_no_locks(
    vae, root, whole, tmp_path, monkeypatch
):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", unsupported)
    folder, out = ImageFolder(root, SIZE), tmp_path / "o"
    begin_again_within(monkeypatch, lambda: encode(folder, out, vae, "test", **OPTIONS))
    with pytest.raises(FileNotFoundError, match="was removed .* another process"):
        encode(folder, out, vae, "test", **OPTIONS)
    assert content(out) == content(whole)


def test_impossible_ranks_and_sizes_are_refused(vae, root, tmp_path):
    for options, said in (
        ({"rank": 2, "world_size": 2}, "rank=2: .* from 0 to 1"),
        ({"batch_size": 0}, "batch_size=0: .* of at least 1"),
        ({"shard_size": 0}, "shard_size=0: .* of at least 1"),
        ({"workers": 0}, "workers=0: .* of at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            encode(
                ImageFolder(root, SIZE),
                tmp_path / "o",
                vae,
                "t",
                **{**OPTIONS, **options},
            )
    assert not (tmp_path / "o").exists()


def test_resuming_with_anything_else_is_refused_and_nothing_is_written(
    vae, root, copy, tmp_path
):
    before = content(copy)
    folder = ImageFolder(root, SIZE)
    cases = {
        "vae": lambda: encode(folder, copy, make_vae(1), "test", **OPTIONS),
        "image_size": lambda: encode(
            ImageFolder(root, 32), copy, vae, "test", **OPTIONS
        ),
        "data": lambda: encode(
            ImageFolder(draw_images(tmp_path / "more", 21), SIZE),
            copy,
            vae,
            "test",
            **OPTIONS,
        ),
        "flip": lambda: encode(folder, copy, vae, "test", **OPTIONS, flip=False),
        "shard_size": lambda: encode(
            folder, copy, vae, "test", **{**OPTIONS, "shard_size": 7}
        ),
        "classes": lambda: encode(
            ImageFolder(root, SIZE, conditional=False), copy, vae, "test", **OPTIONS
        ),
    }
    for what, attempt in cases.items():
        with pytest.raises(ValueError, match=what):
            attempt()
        assert content(copy) == before
    scaled = make_vae()
    scaled.register_to_config(scaling_factor=0.18215)
    with pytest.raises(ValueError, match=r"0\.18215"):
        encode(folder, copy, scaled, "test", **OPTIONS)


def test_same_autoencoder_from_another_place_may_go_on(vae, root, copy):
    before = content(copy)
    (copy / "shard-00001.json").unlink()
    assert encode(ImageFolder(root, SIZE), copy, vae, "/moved", **OPTIONS) is not None
    assert content(copy) == before


def test_folder_with_other_things_is_refused(vae, root, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        encode(ImageFolder(root, SIZE), tmp_path, vae, "test", **OPTIONS)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_another_decoder_of_the_same_encoder_is_welcome(vae, root, whole, copy):
    finetuned = make_vae()
    with torch.no_grad():
        finetuned.decoder.conv_out.bias.add_(0.1)
        finetuned.post_quant_conv.bias.add_(0.1)
    ours, theirs = vae_identity(vae, "original"), vae_identity(finetuned, "finetuned")
    assert ours["encoder_sha256"] == theirs["encoder_sha256"]
    assert ours["decoder_sha256"] != theirs["decoder_sha256"]
    LatentStore(whole).check_vae(finetuned)
    check_encoder(ours, theirs, "samples")
    (copy / "shard-00001.json").unlink()
    assert (
        encode(ImageFolder(root, SIZE), copy, finetuned, "finetuned", **OPTIONS)
        is not None
    )
    assert content(copy) == content(whole)


def test_a_store_of_the_first_format_is_refused_with_what_to_do(vae, root, copy):
    for name in ("manifest.json", "plan.json"):
        content = json.loads((copy / name).read_text()) | {
            "format": "diffussm-latents-1"
        }
        (copy / name).write_text(json.dumps(content))
    for attempt in (
        lambda: LatentStore(copy),
        lambda: encode(ImageFolder(root, SIZE), copy, vae, "t", **OPTIONS),
    ):
        with pytest.raises(
            ValueError, match="encode the images again, into a new folder"
        ):
            attempt()


def test_the_plan_says_whether_images_were_turned_by_exif(vae, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    lying = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(lying).save(tmp_path / "images" / "a.png", exif=exif)
    stores = {}
    for turned in (False, True):
        images = images_from(tmp_path / "images", SIZE, exif_rotate=turned)
        stores[turned] = encode(images, tmp_path / f"{turned}", vae, "t", **OPTIONS)
        assert stores[turned].manifest["exif_rotate"] is turned
    upright = vae.encode(images.read(0)[None]).latent_dist.mean[0] * 0.5
    torch.testing.assert_close(stores[True][0][0], upright, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stores[False][0][0], upright, atol=0.05)
    with pytest.raises(ValueError, match="exif_rotate .there False, asked True"):
        encode(images, tmp_path / "False", vae, "t", **OPTIONS)


class Pixels:
    """An autoencoder whose latents are the pixels."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(
        scaling_factor=1.0, latent_channels=3, block_out_channels=(1,)
    )

    def state_dict(self):
        return {}

    def encode(self, images):
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=images, logvar=torch.zeros_like(images))
        )


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_training_encoding_and_scoring_see_the_same_pixels(tmp_path, exif_rotate):
    from test_formats import draw_weird

    from diffussm.image_sets import read_images

    truth = draw_weird(tmp_path / "weird")
    folder = images_from(tmp_path / "weird", 24, exif_rotate=exif_rotate)
    store = encode(folder, tmp_path / "o", Pixels(), "pixels", flip=False, **OPTIONS)
    refused = {name for name, expected in truth.items() if isinstance(expected, str)}
    assert {
        name for shard in store.manifest["shards"] for name, _ in shard["skipped"]
    } == refused
    good = [i for i in range(len(folder)) if folder.name(i) not in refused]
    assert len(store) == len(good) and store.classes == folder.classes
    for place, i in enumerate(good):
        levels = [((x + 1) * 127.5).round() for x in (store[place][0], folder[i][0])]
        assert torch.equal(*levels) and store[place][1] == folder[i][1], folder.name(i)
    scored = torch.cat(
        list(read_images(tmp_path / "weird", size=24, exif_rotate=exif_rotate))
    )
    trained = torch.stack([((folder[i][0] + 1) * 127.5).round() for i in good])
    assert torch.equal(scored.float(), trained)


def flushing_fails(monkeypatch, number):
    """Folders cannot be flushed; files can."""
    plain = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_flush_folders_is_warned_of_once(
    vae, root, whole, tmp_path, monkeypatch, caplog, number
):
    flushing_fails(monkeypatch, number)
    files._warn_of_flushing.cache_clear()
    encode(ImageFolder(root, SIZE), tmp_path / "o", vae, "test", **OPTIONS)
    assert content(tmp_path / "o") == content(whole)
    assert ["cannot flush" in record.getMessage() for record in caplog.records] == [
        True
    ]


def test_a_disk_that_is_broken_does_stop_the_encoding(vae, root, tmp_path, monkeypatch):
    flushing_fails(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        encode(ImageFolder(root, SIZE), tmp_path / "o", vae, "test", **OPTIONS)


def test_images_that_do_not_divide_are_refused(vae, root, tmp_path):
    with pytest.raises(ValueError, match="multiples of 2"):
        encode(ImageFolder(root, 15), tmp_path / "o", vae, "t", **OPTIONS)


def test_truncated_or_missing_shard_is_made_again(vae, root, whole, copy):
    (copy / "shard-00002.npy").unlink()
    (copy / "shard-00000.npy").write_bytes(b"")
    encode(ImageFolder(root, SIZE), copy, vae, "test", **OPTIONS)
    assert content(copy) == content(whole)


@pytest.mark.parametrize(
    "noise", [b"", b"[]", b"{}", b"null", b'{"vae": 3}', b"\xff", b"{" * 10000]
)
def test_damaged_plan_is_refused(vae, root, copy, noise):
    (copy / "plan.json").write_bytes(noise)
    with pytest.raises(ValueError, match=r"plan\.json"):
        encode(ImageFolder(root, SIZE), copy, vae, "test", **OPTIONS)


def test_damaged_record_makes_its_shard_again(vae, root, whole, copy):
    for number, noise in enumerate([b"", b"[]", b'{"images": -1}', b'{"images": "x"}']):
        (copy / f"shard-{number:05d}.json").write_bytes(noise)
    encode(ImageFolder(root, SIZE), copy, vae, "test", **OPTIONS)
    assert content(copy) == content(whole)


def test_plan_knows_the_data_by_names_labels_and_pixels(vae, root):
    identity = vae_identity(vae, "t")
    options = {"batch_size": 4, "shard_size": 6, "flip": True}
    images = torch.rand(3, 3, 16, 16)
    plans = [
        make_plan(source, identity, **options)["data"]["sha256"]
        for source in (
            ImageFolder(root, SIZE),
            ImageFolder(root, SIZE, conditional=False),
            TensorData(images),
            TensorData(images.flip(0)),
            TensorData(images, torch.tensor([0, 1, 0])),
        )
    ]
    assert len(set(plans)) == len(plans)
    assert (
        plans[0]
        == make_plan(ImageFolder(root, SIZE), identity, **options)["data"]["sha256"]
    )
