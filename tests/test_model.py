"""Ch. "The model": the network, its additions, and its two files."""

import copy
import json
import math
import os
import pickle
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from drawings import drawn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffussm
from diffussm.bidirectional import BidirectionalSSM, Convolution
from diffussm.data import digits
from diffussm.diffusion import GaussianDiffusion
from diffussm.fft_convolution import FFT
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.recomputation import Recompute

SMALL = {
    "input_size": 8,
    "in_channels": 3,
    "num_classes": 10,
    "d_model": 16,
    "n_blocks": 2,
    "d_state": 4,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(**options):
    """A small model whose zeros are random numbers."""
    model = DiffuSSM(DiffuSSMConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kernel" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def inputs(batch=3, **size):
    x = torch.randn(batch, 3, size.get("height", 8), size.get("width", 8))
    return x, torch.arange(batch) * 100, torch.arange(batch)


def test_xl_has_668_8_million_parameters():
    """29 blocks of (15 + 2) D^2 and the rest; the paper says about 673M."""
    with torch.device("meta"):
        model = DiffuSSM.from_preset("DiffuSSM-XL", input_size=32)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / 668.8e6 - 1) < 1e-3
    assert (model.config.height, model.config.in_channels, model.config.seq_len) == (
        32,
        4,
        1024,
    )


def test_linear_layers_cost_7_5_L_D2_per_block():
    """Section 3.2 of the paper, counted by PyTorch."""
    with torch.device("meta"):
        model = DiffuSSM.from_preset("DiffuSSM-XL", input_size=32, n_blocks=2)
        x, t, y = (
            torch.empty(1, 4, 32, 32),
            torch.zeros(1),
            torch.zeros(1, dtype=torch.long),
        )
    with FlopCounterMode(display=False, depth=None) as counter:
        model(x, t, y)
    counts = {
        module: sum(flops.values()) / 2
        for module, flops in counter.get_flop_counts().items()
    }
    for block in range(2):
        linear = sum(
            counts[f"DiffuSSM.blocks.{block}.{name}"]
            for name in ("w0", "w1", "w2", "w3", "w_up", "w_down", "modulation")
        )
        assert abs(linear / (7.5 * 1024 * 1152**2) - 1) < 0.03


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = DiffuSSM.from_preset(name)
    assert model.config.patch_size == (
        2 if name.endswith("/2") or name == "emoji" else 1
    )
    assert model.null_label == model.config.num_classes


def test_new_model_returns_zeros_of_twice_the_channels():
    model = DiffuSSM(DiffuSSMConfig(**SMALL))
    assert torch.equal(model(*inputs()), torch.zeros(3, 6, 8, 8))


def test_conditional_model_listens_to_time_and_class():
    model = awake()
    x, t, y = inputs()
    out = model(x, t, y)
    assert (out - model(x, t + 1, y)).abs().amax((1, 2, 3)).min() > 1e-4
    changed = (
        (out - model(x, t, torch.tensor([0, 1, model.null_label])))
        .abs()
        .amax((1, 2, 3))
    )
    assert changed[0] == 0 and changed[1] == 0 and changed[2] > 1e-4


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_an_empty_batch_gives_an_empty_answer(recompute):
    model = awake()
    model.activation_checkpointing = recompute
    out = model(*inputs(0))
    assert out.shape == (0, 6, 8, 8)
    out.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad(), model.cached_kernels():
        assert model(*inputs(0)).shape == (0, 6, 8, 8)
        assert model(*inputs(2)).shape == (2, 6, 8, 8)
    assert model(torch.zeros(0, 3, 8, 8), torch.zeros(0), []).shape == (0, 6, 8, 8)


def test_unconditional_model_has_no_table():
    model = awake(num_classes=0)
    x, t, y = inputs()
    assert model.embed_y is None and model.null_label is None
    assert model(x, t).shape == (3, 6, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        model(x, t, y)
    with pytest.raises(ValueError, match="unconditional"):
        model.drop_labels(y)


def test_forward_draws_no_random_numbers():
    model = awake().train()
    batch = inputs()
    state = torch.random.get_rng_state()
    first = model(*batch)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, model(*batch))


@pytest.mark.parametrize("M", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(6, 8), (12, 1), (2, 6), (3, 4), (5, 7)])
def test_any_length_that_m_divides(M, size):
    model = awake(input_size=12, downsample=M, d_model=12)
    x, t, y = inputs(height=size[0], width=size[1])
    if size[0] * size[1] % M:
        with pytest.raises(ValueError, match=f"downsample={M}"):
            model(x, t, y)
    else:
        assert model(x, t, y).shape == (3, 6, *size)


def test_pixels_keep_their_places():
    """With blocks that add nothing, a pixel depends on its own group or patch only."""
    for options, cell in (({}, (1, 2)), ({"patch_size": 2, "downsample": 1}, (2, 2))):
        model = awake(**options)
        for block in model.blocks:
            torch.nn.init.zeros_(block.w3.weight)
            torch.nn.init.zeros_(block.w3.bias)
        x, t, y = inputs(1)
        x.requires_grad_()
        for channel in range(6):
            (gradient,) = torch.autograd.grad(model(x, t, y)[0, channel, 5, 3], x)
            rows, columns = gradient[0].abs().amax(0).nonzero(as_tuple=True)
            assert set(rows.tolist()) == ({5} if cell[0] == 1 else {4, 5})
            assert set(columns.tolist()) == {2, 3}


def test_first_channels_are_the_first_half_of_every_pixels_outputs():
    model = awake(downsample=1)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(6.0)
    assert torch.equal(model(*inputs(1))[0, :, 4, 4], torch.arange(6.0))


def test_outputs_of_a_patch_are_laid_out_channel_by_channel():
    model = awake(downsample=1, patch_size=2)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(24.0)  # (channel, row, column) within a patch
    out = model(*inputs(1))[0]
    for channel, row, column in ((0, 0, 0), (2, 5, 3), (5, 6, 7)):
        assert out[channel, row, column] == 4 * channel + 2 * (row % 2) + column % 2


def test_without_embedding_only_the_sequence_counts():
    x, t, y = inputs()
    reshaped = x.view(3, 3, 4, 16)
    for pos_embed in ("none", "sincos"):
        model = awake(pos_embed=pos_embed)
        same = torch.equal(model(x, t, y).flatten(2), model(reshaped, t, y).flatten(2))
        assert same == (pos_embed == "none")


def test_labels_drop_once_per_sample_at_the_configured_rate():
    model = awake(label_dropout=0.25)
    y = torch.arange(10).repeat(1000)
    dropped = model.drop_labels(y, torch.Generator().manual_seed(1))
    changed = dropped != y
    assert abs(changed.float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(y))
    assert (dropped[changed] == 10).all() and dropped.dtype == y.dtype
    assert torch.equal(dropped, model.drop_labels(y, torch.Generator().manual_seed(1)))
    assert torch.equal(awake(label_dropout=0).drop_labels(y), y)
    assert (awake(label_dropout=1).drop_labels(y) == 10).all()


def test_autocast_bfloat16_is_close_to_float32():
    model = awake()
    batch = inputs()
    streams = []
    model.blocks[1].register_forward_hook(
        lambda module, args, output: streams.append(output.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*batch)
        out.float().square().mean().backward()
    expected = model(*batch)
    assert streams == [torch.float32, torch.float32]
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()
    )


def test_head_computes_in_float32_under_autocast():
    """From the stream on the output is that of float64 up to float32's round-off."""
    model, (x, t, y) = awake(), inputs()
    seen = {}
    model.blocks[-1].register_forward_hook(
        lambda module, args, output: seen.update(x=output, c=args[1])
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t, y)
    assert out.dtype == torch.float32
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        shift, scale = exact.final_modulation(
            torch.nn.functional.silu(seen["c"].double())
        ).chunk(2, dim=1)
        exact_out = exact.head(
            exact.final_norm(seen["x"].double()) * (1 + scale[:, None]) + shift[:, None]
        )
    expected = (
        exact_out.view(3, 8, 4, 2, 6).permute(0, 4, 1, 2, 3).reshape(3, 6, 8, 8)
    )  # pairs of neighbours
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_is_real():
    model = awake(pos_embed="sincos")
    model(*inputs()).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()
    )
    assert not any(tensor.is_complex() for tensor in model.state_dict().values())


def test_initialisation():
    model = DiffuSSM(DiffuSSMConfig(**{**SMALL, "d_model": 64, "num_classes": 1000}))
    for weight in (
        model.embed_y.weight,
        model.embed_t[0].weight,
        model.embed_t[2].weight,
    ):
        assert abs(weight.std() - 0.02) < 0.002
    for block in model.blocks:
        assert block.w3.weight.abs().max() == 0
    assert model.head.weight.abs().max() == 0
    block = model.blocks[0]
    maps = [model.embed_x, model.final_modulation, block.modulation]
    maps += [block.w0, block.w1, block.w2, block.w_up]
    for weight in (*(linear.weight for linear in maps), *block.w_down.weight):
        limit = math.sqrt(6 / sum(weight.shape))  # Xavier's, of inputs and outputs
        assert 0.9 * limit < weight.abs().max() <= limit


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 8, 8)}, r"expected \(B, C=3, H, W\)"),
        ({"x": torch.zeros(3, 3, 64)}, r"expected \(B, C=3, H, W\)"),
        ({"x": torch.zeros(3, 3, 3, 3)}, "downsample=2"),
        ({"x": torch.zeros(3, 3, 0, 8)}, "downsample=2"),
        ({"t": torch.zeros(2)}, r"t has shape \(2,\): expected \(B=3\)"),
        ({"y": None}, "y is missing"),
        (
            {"y": torch.zeros(3, 1, dtype=torch.long)},
            r"y has shape \(3, 1\): expected \(B=3\)",
        ),
        ({"y": torch.tensor([0, 11, 1])}, "y reaches from 0 to 11: expected 0 to 10"),
        ({"y": torch.tensor([0, -1, 1])}, "y reaches from -1 to 1"),
    ],
)
def test_inputs_that_cannot_work_are_refused(change, message):
    x, t, y = inputs()
    with pytest.raises(ValueError, match=message):
        awake()(**{"x": x, "t": t, "y": y, **change})


def test_wrong_dtypes_are_refused():
    x, t, y = inputs()
    with pytest.raises(
        TypeError, match="x is torch.uint8: expected a real floating-point"
    ):
        awake()(x.byte(), t, y)
    with pytest.raises(TypeError, match="y is torch.float32: expected an integer"):
        awake()(x, t, y.float())


def test_unknown_preset_and_override_are_refused():
    with pytest.raises(
        ValueError, match="preset='DiffuSSM-XXL': did you mean 'DiffuSSM-XL'"
    ):
        DiffuSSM.from_preset("DiffuSSM-XXL")
    with pytest.raises(ValueError, match="unknown key 'depth'"):
        DiffuSSM.from_preset("digits", depth=3)


# On disk


def test_save_and_load_give_the_same_model(tmp_path):
    model = awake(input_size=(8, 4))
    model.save_pretrained(tmp_path / "deep" / "folder")
    state = torch.random.get_rng_state()
    loaded = DiffuSSM.from_pretrained(tmp_path / "deep" / "folder")
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.config == model.config
    batch = inputs()
    assert torch.equal(loaded(*batch), model(*batch))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == [
        "config.json",
        "model.safetensors",
    ]
    assert (
        json.loads((tmp_path / "deep" / "folder" / "config.json").read_text())[
            "d_model"
        ]
        == 16
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_are_loaded_as_float32(tmp_path, dtype):
    model = awake()
    model.save_pretrained(tmp_path)
    half = {name: parameter.to(dtype) for name, parameter in model.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "model.safetensors")
    loaded = DiffuSSM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, parameter in half.items():
        assert torch.equal(loaded.state_dict()[name], parameter.float())
    loaded(*inputs()).sum().backward()


def test_float64_weights_stay_float64(tmp_path):
    awake().double().save_pretrained(tmp_path)
    assert DiffuSSM.from_pretrained(tmp_path).head.weight.dtype == torch.float64


def test_saving_again_replaces_but_never_another_model(tmp_path):
    model = awake()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.head.bias += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(DiffuSSM.from_pretrained(tmp_path).head.bias, model.head.bias)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="holds another model: n_blocks .*Take a new folder"
    ):
        awake(n_blocks=1).save_pretrained(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds another model"):
        model.save_pretrained(tmp_path)


def test_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    model = awake()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="there is no .*nowhere: expected what save_pretrained writes",
    ):
        DiffuSSM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.json"):
        DiffuSSM.from_pretrained(tmp_path)
    awake().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*model\.safetensors"):
        DiffuSSM.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    awake().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="the model .*safetensors is damaged"):
        DiffuSSM.from_pretrained(tmp_path)


def test_foreign_weights_are_refused(tmp_path):
    model = awake()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for change, message in (
        ({"head.weight": torch.zeros(2, 2)}, r"head.weight \(there \(2, 2\), asked \("),
        ({"head.bias": tensors["head.bias"].long()}, "head.bias .there torch.int64"),
        (
            {"attention.weight": torch.zeros(1)},
            r"attention.weight \(there \(1,\), asked None",
        ),
    ):
        safetensors.torch.save_file({**tensors, **change}, path)
        with pytest.raises(ValueError, match=message):
            DiffuSSM.from_pretrained(tmp_path)
    del tensors["embed_x.weight"]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="embed_x.weight .there None"):
        DiffuSSM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the configuration"),
        ("[]", "expected names with values"),
        ('{"hidden_size": 3}', "unknown key 'hidden_size'"),
    ],
)
def test_foreign_configuration_is_refused(tmp_path, text, message):
    awake().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DiffuSSM.from_pretrained(tmp_path)


@pytest.fixture
def computed(monkeypatch):
    """How often what a layer needs of its weights was computed."""
    lengths = []
    clear = BidirectionalSSM.prepare
    monkeypatch.setattr(
        BidirectionalSSM,
        "prepare",
        lambda layer, length: lengths.append(length) or clear(layer, length),
    )
    return lengths


def fresh_copy(model):
    """The same weights in a model that was never sampled from."""
    same = DiffuSSM(model.config).to(model.head.weight.dtype)
    same.load_state_dict(model.state_dict())
    return same


def test_kernels_are_computed_once_for_many_forward_passes(computed):
    model, (x, t, y) = awake(), inputs()
    with torch.no_grad():
        expected = model(x, t, y)
        computed.clear()
        with model.cached_kernels():
            outputs = [model(x, t, y) for _ in range(3)]
        assert computed == [64, 64]  # one for each block
        assert all(torch.equal(output, expected) for output in outputs)
        model(x, t, y)
        assert (
            len(computed) == 4 and model._cache is None
        )  # outside of the context nothing is kept


def swap_in_an_average(model):
    average = copy.deepcopy(model)
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        theirs.data = 0.5 * ours.data


def step_of_an_optimizer(model):
    with torch.enable_grad():
        x, t, y = inputs()
        model(x, t, y).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad()


CHANGES = {
    "in place": lambda model: model.blocks[0].ssm.skip.mul_(1.5),
    "through .data": lambda model: (
        model.blocks[1].ssm.backward_kernel.log_dt.data[2].add_(0.3)
    ),
    "one number": lambda model: (
        model.blocks[1].ssm.forward_kernel.C.data.flatten()[:1].add_(1.0)
    ),
    "foreach": lambda model: torch._foreach_mul_(list(model.parameters()), 0.9),
    "loaded": lambda model: model.load_state_dict(awake().state_dict()),
    "assigned": lambda model: model.load_state_dict(awake().state_dict(), assign=True),
    "average swapped in": swap_in_an_average,
    "optimizer": step_of_an_optimizer,
    "cast": lambda model: model.double(),
    "cast down": lambda model: model.bfloat16().float(),
    "replaced": lambda model: setattr(model.blocks[0], "ssm", awake().blocks[1].ssm),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_cached_kernels_are_never_stale(change, computed):
    model, (x, t, y) = awake(), inputs()
    with torch.no_grad(), model.cached_kernels():
        before = model(x, t, y)
        change(model)
        computed.clear()
        after = model(x, t, y)
        assert len(computed) == 2
        assert torch.equal(after, fresh_copy(model)(x, t, y)) and not torch.equal(
            after, before
        )


def test_cached_kernels_follow_the_length_and_the_autocast(computed):
    model, (x, t, y) = awake(), inputs()
    wide = inputs(height=4, width=12)[0]
    with torch.no_grad(), model.cached_kernels():
        for image in (x, wide, x):
            computed.clear()
            output = model(image, t, y)
            assert len(computed) == 2
            assert torch.equal(output, fresh_copy(model)(image, t, y))
        with torch.autocast("cpu", torch.bfloat16):
            under = model(x, t, y)
            assert torch.equal(under, fresh_copy(model)(x, t, y))


def test_cached_kernels_follow_the_way_in_which_a_layer_is_run(computed):
    model, (x, t, y) = awake(), inputs()
    twice = Convolution(FFT.apply, lambda layer, length: 2 * layer.spectra(length))
    with torch.no_grad(), model.cached_kernels():
        before = model(x, t, y)
        model.blocks[0].ssm.convolution = twice
        after = model(x, t, y)
    assert len(computed) == 4 and not torch.equal(after, before)
    with torch.no_grad():
        assert torch.equal(after, model(x, t, y))


def test_parameters_that_are_not_numbers_are_recomputed_and_spread():
    model, (x, t, y) = awake(), inputs()
    with torch.no_grad(), model.cached_kernels():
        model(x, t, y)
        model.blocks[0].ssm.skip.data[0] = math.nan
        assert model(x, t, y).isnan().any()


def test_gradients_flow_to_the_kernels_inside_the_context():
    model, (x, t, y) = awake(), inputs()
    with model.cached_kernels():
        with torch.no_grad():
            model(x, t, y)
        model(x, t, y).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in model.blocks[0].ssm.parameters()
    )


def test_what_was_prepared_is_used_and_gives_the_same(computed):
    model, (x, t, y) = awake(), inputs()
    expected = model(x, t, y)
    ready = model.prepare(64)
    computed.clear()
    assert torch.equal(model(x, t, y, ready), expected) and not computed
    doubled = [2 * part for part in ready]
    assert not torch.allclose(model(x, t, y, doubled), expected)
    with pytest.raises(ValueError, match="prepared has 1 entries, expected 2"):
        model(x, t, y, ready[:1])
    with pytest.raises(ValueError, match="spectra"):
        model(x, t, y, model.prepare(32))


def test_contexts_may_overlap(computed):
    model, (x, t, y) = awake(), inputs()
    first, second = model.cached_kernels(), model.cached_kernels()
    with torch.no_grad():
        first.__enter__()
        model(x, t, y)
        second.__enter__()
        first.__exit__(None, None, None)
        model(x, t, y)
        assert len(computed) == 2
        second.__exit__(None, None, None)
        assert model._cache is None


def test_a_copy_made_inside_the_context_has_kernels_of_its_own():
    model, (x, t, y) = awake(), inputs()
    with torch.no_grad(), model.cached_kernels():
        model(x, t, y)
        other = copy.deepcopy(model)
        swap_in_an_average(other)
        assert torch.equal(other(x, t, y), fresh_copy(other)(x, t, y))
        assert torch.equal(model(x, t, y), fresh_copy(model)(x, t, y))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
)
def test_copies_made_while_kernels_are_kept_keep_none(copied, computed):
    model, (x, t, y) = awake(), inputs()
    with torch.no_grad(), model.cached_kernels():
        model(x, t, y)
        twin = copied(model)
        assert model._samplers == 1 and model._cache is not None
        computed.clear()
        assert torch.equal(twin(x, t, y), model(x, t, y))
        assert computed == [64, 64]  # by the copy, which was not asked to keep them
    assert twin._samplers == 0 and twin._cache is None and model._cache is None
    with torch.no_grad(), twin.cached_kernels():
        twin(x, t, y)
    assert twin._cache is None


def test_the_weights_in_the_package_are_those_of_their_record():
    folder = Path(diffussm.__file__).parent / "weights" / "digits"
    record = json.loads((folder / "record.json").read_text())
    assert record["command"].startswith("diffussm train digits") and record["seed"] == 0
    model = DiffuSSM.from_pretrained(folder)
    assert model.config == DiffuSSMConfig(**PRESETS["digits"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    images, labels = digits("test")
    with torch.no_grad():
        losses = GaussianDiffusion.linear(1000).losses(
            model,
            images,
            torch.full((len(images),), 300),
            labels,
            torch.randn(images.shape),
        )
    assert losses["mse"].mean() < 0.2  # an untrained network predicts zero noise: 1


def test_drawing_has_every_map_of_the_model_with_its_sizes_and_nothing_else():
    boxes = drawn("model.svg")
    sizes = {"d_model": 24, "n_blocks": 1, "in_channels": 3, "patch_size": 2}
    model = DiffuSSM(DiffuSSMConfig(8, downsample=4, num_classes=5, d_state=4, **sizes))
    assert set(boxes) == {name.split(".")[0] for name, _ in model.named_parameters()}
    for name, box in boxes.items():
        linear = [m for m in getattr(model, name).modules() if isinstance(m, nn.Linear)]
        if name != "blocks" and linear:
            widths = [linear[0].in_features, *(m.out_features for m in linear)]
            assert box.widths(D=24, M=4, P=2, C=3) == widths, name
        assert box.label == name
