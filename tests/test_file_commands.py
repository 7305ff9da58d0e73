"""Commands from files to files: vae, encode."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import diffussm, listing

from diffussm import file_commands
from diffussm.autoencoder import load_vae


def test_encode_is_resumed_and_its_store_is_read(work, tmp_path):
    words = (
        "encode {w}/images {t}/store --vae {w}/vae --size 16 --shard_size 8 --device "
        "cpu"
    )
    diffussm(words, w=work, t=tmp_path)
    first = tmp_path / "store" / "shard-00000.npy"
    before, content = (
        first.stat().st_mtime_ns,
        (tmp_path / "store" / "shard-00001.npy").read_bytes(),
    )
    (tmp_path / "store" / "shard-00001.npy").unlink()
    said = diffussm(words + " --verify", w=work, t=tmp_path)
    assert "12 images in 2 classes" in said and "as it was written" in said
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "store" / "shard-00001.npy").read_bytes() == content


@pytest.mark.slow
def test_encode_under_torchrun_gives_the_same_bytes(work, tmp_path):
    torchrun = (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m diffussm".split()
    )
    words = (
        f"encode {work}/images {tmp_path}/store --vae {work}/vae --size 16 "
        "--shard_size 8 --device cpu"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # it decides the last bits
    command = [sys.executable, *torchrun, *words.split()]
    done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    for shard in sorted((work / "latents").glob("*.npy")):
        assert (tmp_path / "store" / shard.name).read_bytes() == shard.read_bytes()


def test_verify_names_a_flipped_byte(work, tmp_path):
    words = "encode {w}/images {t}/store --vae {w}/vae --size 16 --device cpu"
    diffussm(words, w=work, t=tmp_path)
    shard = tmp_path / "store" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "has changed" in diffussm(words + " --verify", 1, w=work, t=tmp_path)


def test_the_vae_command_writes_what_load_vae_reads(work):
    vae = load_vae(work / "vae")
    assert vae.config.scaling_factor > 0 and not list(work.glob(".*.tmp"))
    told = diffussm("vae {w}/images {w}/odd --size 30", 1, w=work)
    assert "--size 30: below 32, expected a multiple of 4" in told


def test_an_lmdb_has_no_classes_to_leave_out(work, tmp_path):
    import lmdb

    with (
        lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as put,
    ):
        for i in range(3):
            put.put(b"%d" % i, (work / "images" / "cats" / f"{i}.png").read_bytes())
    words = "encode {t}/lmdb {t}/store --vae {w}/vae --size 16 --device cpu"
    assert "--no_classes" in diffussm(words + " --no_classes", 1, w=work, t=tmp_path)
    assert "3 images in 0 classes" in diffussm(
        words + " --workers 1", w=work, t=tmp_path
    )


def test_encode_names_what_it_skipped(work, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(
            (work / "images" / "cats" / f"{i}.png").read_bytes()
        )
    said = diffussm(
        "encode {t}/images {t}/s --vae {w}/vae --size 16 --device cpu",
        w=work,
        t=tmp_path,
    )
    assert "1 skipped" in said and "broken.png" in said


def test_many_skipped_images_are_counted_after_the_first(capsys):
    file_commands.tell_skipped(
        [(f"{i}.png", "broken") for i in range(file_commands.SHOWN + 5)]
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == file_commands.SHOWN + 1 and "5 more" in lines[-1]


def test_what_would_become_a_class_of_the_images_is_refused(work, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images")
    before = listing(tmp_path)
    words = "encode {t}/images {t}/images/latents --vae {w}/vae --size 16 --device cpu"
    assert "lies inside" in diffussm(words, 1, w=work, t=tmp_path)
    said = diffussm("vae {t}/images {t}/images/vae --size 16 --steps 2", 1, t=tmp_path)
    assert "lies inside" in said and listing(tmp_path) == before
    for _ in range(2):  # where no sub-folder is a class there is no harm
        said = diffussm(f"{words} --no_classes", w=work, t=tmp_path)
        assert "12 images in 0 classes" in said
