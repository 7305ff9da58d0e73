"""Memory, computed from shapes."""

from dataclasses import replace

import pytest
import torch

from diffussm import recipes, resources
from diffussm.model import DiffuSSM, DiffuSSMConfig


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
        {"activation_checkpointing": True},
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
