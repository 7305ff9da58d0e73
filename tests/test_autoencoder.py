"""An autoencoder is trained, loaded, known by its two halves, or refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from stores import SIZE, make_vae

from diffussm.autoencoder import (
    check_encoder,
    decode,
    load_vae,
    measure_scale,
    moments,
    train_vae,
    vae_identity,
)
from diffussm.data import TensorData

pytestmark = pytest.mark.usefixtures("one_thread")


class Posterior:
    def __init__(self, mean: float, logvar: float) -> None:
        self.mean, self.logvar = (
            torch.full((1, 4, 8, 8), mean),
            torch.full((1, 4, 8, 8), logvar),
        )


class Constant:
    """An autoencoder whose posterior is given."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(scaling_factor=1.0)

    def __init__(self, mean: float, logvar: float) -> None:
        self.posterior = Posterior(mean, logvar)

    def encode(self, images):
        return type("Output", (), {"latent_dist": self.posterior})


@pytest.mark.parametrize(
    "logvar", [-30.0, -29.99, -12.3, 0.0, 20.0]
)  # diffusers clamps to [-30, 20]
def test_log_variance_survives_float16(logvar):
    stored = moments(Constant(3.0, logvar), torch.zeros(1, 3, 16, 16))[0, 1].double()
    ratio = ((stored - logvar) / 2).exp()  # of standard deviations
    assert (ratio - 1).abs().max() < 0.005


@pytest.mark.parametrize(
    ("mean", "logvar"),
    [(1e5, 0.0), (-7e4, 0.0), (float("nan"), 0.0), (0.0, float("nan"))],
)
def test_moments_beyond_float16_are_refused(mean, logvar):
    with pytest.raises(ValueError, match="float16"):
        moments(Constant(mean, logvar), torch.zeros(1, 3, 16, 16))


def test_latents_and_images_do_not_depend_on_tf32():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul

    class Looking(Constant):
        def encode(self, images):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
            return super().encode(images)

        def decode(self, latents):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
            return SimpleNamespace(sample=latents)

    found = [setting.fp32_precision for setting in settings]
    try:
        for before in ("tf32", "ieee"):
            for setting in settings:
                setting.fp32_precision = before
            moments(Looking(3.0, 0.0), torch.zeros(1, 3, 16, 16))
            decode(Looking(3.0, 0.0), torch.zeros(1, 4, 2, 2))
            assert [setting.fp32_precision for setting in settings] == [before, before]
    finally:
        for setting, value in zip(settings, found, strict=True):
            setting.fp32_precision = value


def test_a_record_that_names_no_encoder_is_refused_with_what_to_do(vae):
    with pytest.raises(
        ValueError,
        match="the latents of r: no encoder is on record. Encode the images again",
    ):
        check_encoder(
            {"sha256": "0", "scaling_factor": 0.5},
            vae_identity(vae, "x"),
            "the latents of r",
        )


def test_saved_autoencoder_loads_as_the_same(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    for folder in (
        tmp_path / "vae",
        tmp_path,
    ):  # Stable Diffusion's folders hold theirs in vae/
        loaded = load_vae(folder)
        assert vae_identity(loaded, "x") == vae_identity(vae, "x")
        assert not loaded.training and not any(
            p.requires_grad for p in loaded.parameters()
        )
    identity = vae_identity(vae, "x")
    assert (
        identity["scaling_factor"],
        identity["latent_channels"],
        identity["downsampling"],
    ) == (0.5, 4, 2)
    other = vae_identity(make_vae(1), "x")
    assert all(
        identity[key] != other[key] for key in ("encoder_sha256", "decoder_sha256")
    )


def test_autoencoder_that_is_not_there_is_refused_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_vae(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.json"):
        load_vae(tmp_path)


def test_hub_that_does_not_answer_is_told_with_advice(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    with pytest.raises(OSError, match="pass the folder"):
        load_vae("somebody/some-vae")


def test_damaged_autoencoders_are_refused(vae, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    vae.save_pretrained(tmp_path)
    complete = weights.read_bytes()
    tensors = {
        key: value.clone() for key, value in load_file(weights).items()
    }  # not mapped from the file
    weights.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ValueError, match="no usable"):
        load_vae(tmp_path)
    name = "quant_conv.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match=r"quant_conv|no usable"):
        load_vae(tmp_path)
    save_file(tensors | {"surplus": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"surplus|no usable"):
        load_vae(tmp_path)
    weights.unlink()
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")  # a pickle
    with pytest.raises(ValueError, match="no usable"):
        load_vae(tmp_path)


def test_decode_undoes_the_scaling(vae):
    x0 = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = decode(vae, x0, batch_size=2)
    expected = vae.decode(x0 / 0.5).sample.clamp(-1, 1)
    assert images.shape == (5, 3, SIZE, SIZE)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_an_autoencoder_lowers_its_error_and_sets_its_scale():
    generator = torch.Generator().manual_seed(0)
    quarters = torch.rand(64, 3, 2, 2, generator=generator) * 2 - 1
    data = TensorData(quarters.repeat_interleave(8, 2).repeat_interleave(8, 3))
    options = {"channels": (4, 8), "crop": 16, "batch_size": 8, "progress": False}
    before, after = (train_vae(data, steps=steps, **options) for steps in (1, 150))
    x, _ = data.batch(torch.arange(64))
    error = [
        (vae.decode(vae.encode(x).latent_dist.mean).sample - x).abs().mean()
        for vae in (before, after)
    ]
    assert error[1] < 0.6 * error[0]
    scaled = after.encode(x).latent_dist.mean * after.config.scaling_factor
    assert abs(scaled.std() - 1) < 0.01
    assert not after.training and not any(p.requires_grad for p in after.parameters())
    again = train_vae(data, steps=150, **options)
    assert vae_identity(again, "") == vae_identity(after, "")


def test_the_kl_weight_is_that_of_latent_diffusion(monkeypatch):
    """Sums over an image and its latent, as there; a common factor changes nothing."""
    seen = {}

    def encoding(self, x, plain=AutoencoderKL.encode):
        seen["x"], out = x, plain(self, x)
        seen.setdefault("kl", out.latent_dist.kl())
        return out

    def decoding(self, z, plain=AutoencoderKL.decode):
        out = plain(self, z)
        seen["error"] = out.sample - seen["x"]
        return out

    def backward(loss, plain=torch.Tensor.backward):
        seen["loss"] = loss.item()
        plain(loss)

    monkeypatch.setattr(AutoencoderKL, "encode", encoding)
    monkeypatch.setattr(AutoencoderKL, "decode", decoding)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    data = TensorData(
        torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    train_vae(
        data,
        channels=(4, 8),
        crop=16,
        steps=1,
        batch_size=4,
        kl_weight=1.0,
        progress=False,
    )
    error = seen["error"].double()
    summed = (error.abs() + 3 * error.square()).sum() / 4 + seen[
        "kl"
    ].double().sum() / 4
    assert seen["kl"].mean() > 0.1 * summed  # it weighs enough to be seen
    assert seen["loss"] * 3 * 16 * 16 == pytest.approx(summed.item(), rel=1e-5)
    for wrong in ({"kl_weight": -1.0}, {"lr": 0.0}, {"kl_weight": float("nan")}):
        with pytest.raises(
            ValueError, match=f"{next(iter(wrong))}=.*expected a finite"
        ):
            train_vae(data, channels=(4, 8), crop=16, steps=1, progress=False, **wrong)


def test_images_that_are_all_alike_have_no_scale():
    flat = Constant(0.0, 0.0)
    with pytest.raises(ValueError, match="all alike"):
        measure_scale(flat, TensorData(torch.zeros(8, 3, 16, 16)))


@pytest.mark.parametrize(
    "wrong", [{"crop": 32}, {"crop": 15}, {"steps": 0}, {"channels": (6, 8)}]
)
def test_autoencoder_whose_sizes_do_not_fit_is_refused(wrong):
    options = {"channels": (4, 8), "crop": 16, "steps": 1, "progress": False} | wrong
    with pytest.raises(ValueError, match="crop|steps"):
        train_vae(TensorData(torch.zeros(8, 3, 16, 16)), **options)
