"""A network as diffusers wants components, with the weights of the original."""

import pytest
import torch

pytest.importorskip("diffusers")
from pipelines import network, piped

from diffussm.denoiser import Denoiser, as_denoiser

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


def test_a_network_comes_out_of_its_wrapper_and_others_stay():
    model, other = network(), torch.nn.Linear(1, 1)
    inner = as_denoiser(torch.nn.DataParallel(model))
    assert isinstance(inner, Denoiser) and as_denoiser(inner) is inner
    assert as_denoiser(other) is other


def test_the_only_variant_is_found_and_one_of_several_is_not_chosen(tmp_path):
    model = network()
    model.save_pretrained(tmp_path, "fp16")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [
        "model.fp16.safetensors"
    ]
    found = Denoiser.from_pretrained(tmp_path)
    assert torch.equal(found.head.weight, model.head.weight)
    model.save_pretrained(tmp_path, "ema")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Denoiser.from_pretrained(tmp_path)
    with torch.no_grad():
        model.head.weight.zero_()
    model.save_pretrained(tmp_path)
    assert not Denoiser.from_pretrained(tmp_path).head.weight.any()
    assert Denoiser.from_pretrained(tmp_path, variant="ema").head.weight.any()
