"""A network as diffusers wants components, with the weights of the original."""

import pytest
import torch

pytest.importorskip("diffusers")
from pipelines import network, piped

from diffussm.denoiser import Denoiser

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def test_wrapping_shares_the_weights():
    model = network()
    pipe = piped(model)
    assert pipe.denoiser.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert (
        isinstance(pipe.denoiser, Denoiser)
        and not pipe.denoiser.head.weight.requires_grad
    )
    assert model.head.weight.requires_grad
    assert pipe.device.type == "cpu" and pipe.dtype == torch.float32
    assert {"denoiser", "scheduler", "vae"} == set(pipe.components)
