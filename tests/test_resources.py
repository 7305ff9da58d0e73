"""Memory and time: computed from shapes, and cards by their very name."""

from dataclasses import replace

import pytest
import torch
from processes import SHARED

from diffussm import recipes, resources
from diffussm.hourglass import linear_macs
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.resources import peak_flops, utilisation


@pytest.mark.parametrize("name", recipes.recipe_files())
def test_every_recipe_fits_eight_gpus_of_80_gb(name):
    assert resources.memory_needed(*recipes.read_recipe(name), 8)["total"] < 80e9


def test_the_memory_estimate_is_what_autograd_really_keeps():
    """The fake run of one block against a real model, batches of 1 and 3, float32."""
    model = DiffuSSM(
        DiffuSSMConfig(
            input_size=8,
            in_channels=1,
            num_classes=2,
            d_model=32,
            n_blocks=3,
            d_state=8,
        )
    )

    def kept(images):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = (
                tensor.untyped_storage().nbytes()
            )
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(
                torch.randn(images, 1, 8, 8),
                torch.zeros(images).long(),
                torch.zeros(images).long(),
            )
        del out
        own = {
            parameter.untyped_storage().data_ptr() for parameter in model.parameters()
        }
        return sum(count for key, count in storages.items() if key not in own)

    _, each = resources.saved_bytes(model.config, "float32")
    real = (kept(3) - kept(1)) / 2
    assert 0.8 < 3 * each / real < 1.1  # the ends of the model keep something too


def test_memory_falls_with_recompute_fsdp_and_smaller_parts():
    config, execution = recipes.read_recipe("imagenet256")
    total = resources.memory_needed(config, execution, 8)["total"]
    for option in (
        {"activation_checkpointing": "all"},
        {"activation_checkpointing": "elementwise"},
        {"strategy": "fsdp"},
        {"micro_batch": 8},
    ):
        assert (
            resources.memory_needed(config, replace(execution, **option), 8)["total"]
            < total
        )
    states = resources.memory_needed(config, execution, 8)[
        "weights, gradients, average, moments"
    ]
    with torch.device("meta"):
        assert states == 20 * sum(
            p.numel() for p in DiffuSSM(config.model).parameters()
        )


def test_multiply_adds_follow_the_papers_formula():
    """15 L D^2 / 2 per block at M = 2, 29 blocks of 1152 at 1024 positions."""
    xl = DiffuSSMConfig(**PRESETS["DiffuSSM-XL"])
    assert linear_macs(xl) == pytest.approx(29 * 7.5 * 1024 * 1152**2)
    assert (
        peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("Abacus") is None
    )


@pytest.mark.parametrize(
    ("name", "teraflops"),  # names as torch.cuda.get_device_name gives them
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H1000", None),
    ],
)
def test_the_peak_is_that_of_the_very_card(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_a_card_without_a_figure_gets_a_sentence_and_no_neighbours(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 1e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "NVIDIA H100 Ultra")
    assert "mfu" not in utilisation(SHARED.model, 100.0, torch.device("cuda", 0))
    assert "peak of 'NVIDIA H100 Ultra' is not known" in capsys.readouterr().err


def test_the_peak_of_memory_is_that_of_one_line_of_the_log(monkeypatch):
    peak, gpu = [0, 3e9], torch.device("cuda", 1)  # by the number of the GPU
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda g: peak[g.index])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda g: peak.__setitem__(g.index, 1e9)
    )
    names = ["an other", "NVIDIA H100 PCIe"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda g: names[g.index])
    first, second = (utilisation(SHARED.model, 100.0, gpu) for _ in range(2))
    assert (first["memory_gb"], second["memory_gb"]) == (3.0, 1.0) and first[
        "mfu"
    ] == second["mfu"]
