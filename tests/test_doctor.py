"""The doctor: questions to a plan, and processes that may be killed."""

import re
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import diffussm, listing

from diffussm import doctor, recipes
from diffussm.options import Execution
from diffussm.run_commands import doctor as ask_all
from diffussm.run_commands import train
from diffussm.run_folder import read_run


def plan(recipe, execution=None, **options):
    """The plan that the command line would have made on this machine."""
    known = {"device": "cpu", "processes": 1, "limit": 60.0} | options
    return doctor.Plan.here(recipe, execution or Execution(), **known)


def test_doctor_passes_what_is_fine_and_skips_what_was_not_asked(work):
    said = diffussm(
        "doctor {w}/tiny.yaml --data {w}/latents --vae {w}/vae --out {w}/new "
        "--device cpu --processes 2",
        w=work,
    )
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    for what in ("memory", "processes", "disk", "data", "autoencoder"):
        assert f"pass  {what}" in lines, said
    for what in ("GPU", "bf16", "Inception", "reference"):
        assert f"skip  {what}" in lines, said
    assert (
        "16 x 16 pixels" in lines["pass  autoencoder"]
        and "checksum" in lines["pass  data"]
    )
    assert not (work / "new").exists()


def test_doctor_fails_with_everything_that_is_wrong_at_once(work, tmp_path):
    said = diffussm(
        "doctor imagenet512 --data {w}/latents --vae {w}/other --out {t} --device "
        "cpu --processes 1 "
        "--limit 0.01 --reference {t}/none --micro_batch 256 --weights {w}/tiny.yaml",
        1,
        w=work,
        t=tmp_path,
    )
    for what in (
        "memory",
        "processes",
        "data",
        "autoencoder",
        "Inception",
        "reference",
    ):
        assert f"FAIL  {what}" in said, said
    assert (
        "--micro_batch" in said
        and "made by the encoder of" in said
        and not list(tmp_path.iterdir())
    )


def test_doctor_takes_every_option_that_train_takes():
    lacking = signature(train).parameters.keys() - signature(ask_all).parameters.keys()
    assert not lacking


def test_the_folder_is_free_or_of_this_run_or_refused(work, tmp_path):
    digits, execution = read_run(work / "digits")[:2]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    before = listing(work)
    for out, lr, verdict, told in (
        (tmp_path / "new", digits.lr, "pass", "free"),
        (work / "digits", digits.lr, "pass", "goes on"),
        (work / "digits", digits.lr / 2, "FAIL", "holds another run"),
        (tmp_path / "letters", digits.lr, "FAIL", "holds no training run"),
    ):
        found = doctor.examine(
            "folder", plan(replace(digits, lr=lr), execution, out=out)
        )
        assert found.verdict == verdict and told in found.told, found
    assert doctor.examine("folder", plan(digits)).verdict == "skip"
    assert listing(work) == before and not (tmp_path / "new").exists()


def test_the_weights_that_a_run_begins_with_are_looked_at(work, tmp_path):
    digits, execution = read_run(work / "digits")[:2]
    few = replace(digits, model=replace(digits.model, num_classes=3))
    wide = replace(digits, model=replace(digits.model, d_model=32))
    for recipe, other, out, verdict, told in (
        (digits, work / "digits", tmp_path / "new", "pass", "new: nothing"),
        (few, work / "digits", tmp_path / "new", "pass", "new: embed_y.weight"),
        (wide, work / "digits", tmp_path / "new", "FAIL", "--model.d_model"),
        (digits, tmp_path / "nowhere", tmp_path / "new", "FAIL", "no config.json"),
        (digits, work / "digits", work / "digits", "FAIL", "other weights"),
    ):
        known = {"out": out, "init_from": other}
        found = doctor.examine("start", plan(recipe, execution, **known))
        assert found.verdict == verdict and told in found.told, found
    assert doctor.examine("start", plan(digits)).verdict == "skip"
    assert not list(tmp_path.iterdir())


def test_held_out_images_are_looked_at_if_the_run_is_scored(work):
    digits = recipes.read_recipe("digits")[0]
    for held_out, verdict, told in (
        ("", "pass", "images"),
        (str(work / "nowhere"), "FAIL", "nowhere"),
    ):
        scored = Execution(score_every=50, held_out=held_out)
        found = doctor.examine("held-out", plan(digits, scored))
        assert found.verdict == verdict and told in found.told, found
    assert doctor.examine("held-out", plan(digits)).verdict == "skip"


def test_samples_of_latents_on_the_way_need_a_decoder(work):
    latents = recipes.read_recipe(str(work / "tiny.yaml"))[0]
    found = doctor.examine("autoencoder", plan(latents, Execution(sample_every=50)))
    assert found.verdict == "FAIL" and "--vae" in found.told
    assert doctor.examine("autoencoder", plan(latents)).verdict == "skip"


def test_doctor_reads_every_byte_unless_told_to_be_quick(work, tmp_path):
    diffussm(
        "encode {w}/images {t}/s --vae {w}/vae --size 16 --device cpu",
        w=work,
        t=tmp_path,
    )
    shard = tmp_path / "s" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    config = replace(
        recipes.read_recipe(str(work / "tiny.yaml"))[0], data=str(tmp_path / "s")
    )
    for quick, verdict in ((True, "pass"), (False, "FAIL")):
        assert doctor.examine("data", plan(config, quick=quick)).verdict == verdict


def test_a_recipe_that_compiles_needs_a_compiler(monkeypatch):
    large, execution = recipes.read_recipe("imagenet256")
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor.examine("compiler", plan(large, execution))
    assert finding.verdict == "FAIL" and "--compile false" in finding.told
    monkeypatch.setenv("CXX", sys.executable)
    assert doctor.examine("compiler", plan(large, execution)).verdict == "pass"
    assert doctor.examine("compiler", plan(large)).verdict == "skip"


def test_a_full_or_read_only_disk_fails(monkeypatch, tmp_path):
    large = recipes.read_recipe("imagenet256")
    run = plan(*large, processes=8, out=tmp_path / "run")
    usage = type("", (), {"free": 10e9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    finding = doctor.examine("disk", run)
    assert finding.verdict == "FAIL" and "10.0 GB free" in finding.told
    few = doctor.examine(
        "disk", plan(*recipes.read_recipe("digits"), out=tmp_path / "x")
    )
    assert re.search(r"[1-9]\d*\.\d MB needed", few.told)
    monkeypatch.setattr(doctor.os, "access", lambda path, how: False)
    assert "cannot be written" in doctor.examine("disk", run).told


def as_process(monkeypatch, rank, gpus):
    """As torchrun would start it, on a machine with so many GPUs."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.slow
def test_under_torchrun_each_process_asks_for_its_own_gpu(monkeypatch, work):
    as_process(monkeypatch, rank=5, gpus=8)
    seen = []

    def memory(device):
        seen.append(device)
        return 1e12, 1e12

    def decoder(name, device, made_by):
        seen.append(device)
        raise ValueError("no GPU here")

    def card(index):
        seen.append(torch.device("cuda", index))
        return SimpleNamespace(name="a card", total_memory=80e9)

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", card)
    monkeypatch.setattr(doctor, "open_decoder", decoder)
    config = replace(
        recipes.read_recipe(str(work / "tiny.yaml"))[0],
        data=str(work / "latents"),
        batch_size=8,
    )
    for what in ("GPU", "memory", "autoencoder"):
        doctor.examine(what, plan(config, device=None, vae="x"))
    assert seen == [torch.device("cuda", 5)] * 3


@pytest.mark.slow
def test_a_process_without_a_gpu_fails_before_it_takes_that_of_another(monkeypatch):
    as_process(monkeypatch, rank=2, gpus=2)
    large = recipes.read_recipe("imagenet256")
    finding = doctor.examine("GPU", plan(*large, device=None))
    assert finding.verdict == "FAIL" and "there are 2" in finding.told


def test_a_device_that_is_not_there_is_said_and_not_asked(monkeypatch, work):
    assert "--device gpu: " in diffussm("doctor digits --device gpu", 1)

    def without(*_):
        raise AssertionError("Torch not compiled with CUDA enabled")

    for name in ("mem_get_info", "set_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, without)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    said = diffussm(
        "doctor {w}/tiny.yaml --data {w}/latents --vae {w}/vae --precision bf16 "
        "--device cuda --steps 40 --trial 10",
        1,
        w=work,
    )
    assert "FAIL  GPU: torch sees no GPU" in said and said.count("FAIL") == 1
    for what in ("memory", "bf16", "processes", "autoencoder", "trial"):
        assert f"skip  {what}: " in said


@pytest.mark.slow
def test_only_the_first_process_reads_data_disk_and_files(monkeypatch, work):
    from diffussm import features

    read = []
    monkeypatch.setattr(doctor, "verify_store", lambda path: read.append(path) or [])
    monkeypatch.setattr(features, "check_weights", read.append)
    monkeypatch.setattr(doctor, "published", read.append)
    monkeypatch.setattr(
        doctor.shutil,
        "disk_usage",
        lambda path: read.append(path) or SimpleNamespace(free=1e15),
    )
    config = replace(
        recipes.read_recipe(str(work / "tiny.yaml"))[0], data=str(work / "latents")
    )
    paths = {
        "weights": work / "tiny.yaml",
        "reference": work / "tiny.yaml",
        "vae": str(work / "vae"),
    }
    for rank, verdict in ((1, "skip"), (0, "pass")):
        read.clear()
        monkeypatch.setenv("RANK", str(rank))
        for what in ("disk", "data", "Inception", "reference"):
            assert doctor.examine(what, plan(config, **paths)).verdict == verdict
        doctor.examine("autoencoder", plan(config, **paths))
        assert len(read) == (5 if rank == 0 else 0)
    assert "--processes" in diffussm_under_torchrun(
        monkeypatch, "doctor digits --processes 2"
    )


def diffussm_under_torchrun(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    return diffussm(command, 1)


def test_doctor_passes_over_the_memory_where_the_system_does_not_tell(monkeypatch):
    real = Path.read_text

    def read_text(self, *arguments, **options):
        if str(self) == "/proc/meminfo":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    digits = plan(*recipes.read_recipe("digits"))
    assert doctor.examine("memory", digits).verdict == "skip"


def test_doctor_takes_the_options_of_the_recipe(plain):
    words = (
        f"doctor digits --data {plain.folder}/images --device cpu --processes 1 "
        "--quick "
    )
    assert "FAIL  data" in diffussm(words, 1)
    said = diffussm(
        words + "--model.in_channels 3 --model.num_classes 0 --batch_size 4"
    )
    assert "pass  data: 6 images" in said


def test_doctor_infers_what_train_would(work, tmp_path):
    words = "doctor pixels --device cpu --processes 1 --quick --out {t}/run --data "
    said = diffussm(words + "{w}/images", w=work, t=tmp_path)
    assert "--model.num_classes 2 --batch_size 12" in said
    assert "pass  data: 12 images in 2 classes" in said
    said = diffussm(words + "{w}/images --batch_size 20", 1, w=work, t=tmp_path)
    assert "FAIL  data" in said and "add --batch_size 12" in said
    said = diffussm(words + "{t}/nowhere", 1, w=work, t=tmp_path)
    assert "FAIL  data: there is no" in said and "pass  memory" in said
    said = diffussm(words.replace("pixels", "latents") + "{w}/images", 1, w=work, t="x")
    assert "FAIL  data" in said and "diffussm encode" in said
    assert not list(tmp_path.iterdir())
