"""Networks to compare with: one thing differs, and it is the one that is named."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from diffussm import autotuning, recomputation
from diffussm.bidirectional import BidirectionalSSM, way
from diffussm.cli import main
from diffussm.denoiser import Denoiser
from diffussm.efficiency import DiT
from diffussm.files import sha256, write_json
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.options import RECIPES, Execution
from diffussm.parallel import check_way, create_state
from diffussm.run_folder import load_run
from diffussm.runs import train
from diffussm.variants import (
    OneWay,
    Taps,
    count_parameters,
    image_macs,
    matched,
    network,
    places,
)

SIZES = PRESETS["digits"] | {"d_model": 16, "n_blocks": 2, "d_state": 4}
CONFIG = DiffuSSMConfig(**SIZES)
ALL = ["", "taps:0", "taps:5", "start:inv", "start:legs", "start:real", "gate:sum"]
ALL += ["direction:forward", "direction:alternating", "direction:shared"]
ALL += ["order:snake", "order:hilbert", "variance:fixed", "attention:20"]


def awake(variant, config=CONFIG, seed=0):
    """A variant whose last maps are not zero."""
    torch.manual_seed(seed)
    model = network(variant, config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return model.eval()


def inputs():
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 8, 8, generator=draws)
    return x, torch.tensor([5, 900]), torch.tensor([1, 10])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
def test_a_variant_is_trained_saved_and_resumed_by_the_trainer(variant, tmp_path):
    recipe = replace(
        RECIPES["digits"], model=CONFIG, steps=4, warmup=1, cooldown=1, batch_size=4
    )
    ways = {"progress": False, "network": lambda config: network(variant, config)}
    how = Execution(log_every=2, save_every=2, keep_last=9)
    whole = train(recipe, tmp_path / "a", how, "cpu", **ways)
    last = tmp_path / "a" / "checkpoints" / "step_00000004"
    (last / "state.json").write_text("{}")  # damaged: it goes on from step 2
    again = train(recipe, tmp_path / "a", how, "cpu", **ways)
    for p, q in zip(whole.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(p, q)


OTHERS = [name for name in ALL if name and not name.startswith("start")]
SHORT = replace(
    RECIPES["digits"], model=CONFIG, steps=2, warmup=1, cooldown=1, batch_size=4
)


@pytest.mark.parametrize("variant", OTHERS)
def test_a_variant_is_not_taken_for_the_model(variant, tmp_path):
    model = network(variant, CONFIG)
    with pytest.raises(ValueError, match=f"variant '{variant}'"):
        DiffuSSM(model.config)
    with pytest.raises(ValueError, match=f"variant '{variant}'"):
        Denoiser.of(model)
    if not isinstance(model, DiffuSSM):
        return
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"variant '{variant}'"):
        DiffuSSM.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["", "start:legs"])
def test_a_start_is_a_model_like_any_other(variant, tmp_path):
    model = awake(variant)
    model.save_pretrained(tmp_path)
    for same in (DiffuSSM.from_pretrained(tmp_path), Denoiser.of(model)):
        assert same.config == CONFIG
        with torch.no_grad():
            assert torch.equal(same(*inputs()), model(*inputs()))


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    """The folder of a run of a variant."""
    run = tmp_path_factory.mktemp("runs") / "sum"
    how = {"progress": False, "network": partial(network, "gate:sum")}
    train(SHORT, run, Execution(), "cpu", **how)
    return run


def test_a_run_of_a_variant_is_not_drawn_from_as_if_it_were_the_model(
    summed, tmp_path, capsys
):
    with pytest.raises(ValueError, match="variant 'gate:sum'"):
        load_run(summed)
    out = tmp_path / "out.png"
    asked = ["sample", "--from", str(summed), "--out", str(out), "--device", "cpu"]
    assert main(asked) == 1
    assert "variant 'gate:sum'" in capsys.readouterr().err and not out.exists()


def test_a_run_of_a_variant_goes_on_as_that_variant_only(summed):
    for other in (DiffuSSM, partial(network, "order:snake")):
        with pytest.raises(ValueError, match="it is of the variant 'gate:sum', not of"):
            train(SHORT, summed, Execution(), "cpu", progress=False, network=other)
    own = partial(network, "gate:sum")
    state = train(SHORT, summed, Execution(), "cpu", progress=False, network=own)
    assert state.step == 2


def test_a_run_that_did_not_record_its_variant_goes_on(summed):
    (step,) = (summed / "checkpoints").iterdir()
    record = json.loads((step / "state.json").read_text())
    for name in ("model/config.json", "ema/config.json"):
        known = json.loads((step / name).read_text())
        assert known.pop("variant") == "gate:sum"
        write_json(step / name, known)
        record["sha256"][name] = sha256(step / name)
    write_json(step / "state.json", record)
    own = partial(network, "gate:sum")
    assert train(SHORT, summed, Execution(), "cpu", network=own).step == 2


CHUNKS = ["taps:5", "direction:forward", "direction:alternating"]


@pytest.mark.parametrize("variant", CHUNKS)
def test_a_layer_without_states_is_not_run_by_chunks(variant, monkeypatch):
    build, cpu = partial(network, variant), torch.device("cpu")
    for asked in ("chunked", "chunked_triton"):
        for refused in (
            lambda how: check_way(build, SHORT, how),
            lambda how: create_state(SHORT, how, cpu, build),
        ):
            with pytest.raises(ValueError, match="convolution=fft"):
                refused(Execution(convolution=asked))
    won = SimpleNamespace(convolution=way("chunked"), reason="it won")
    monkeypatch.setattr(autotuning, "autotune_convolution", lambda *_, **__: won)
    found = [
        create_state(SHORT, Execution(convolution="auto"), cpu, one)
        for one in (build, DiffuSSM)
    ]
    taken = [state.ema.blocks[1].ssm.convolution for state in found]
    assert taken == [way("fft"), way("chunked")]
    check_way(build, SHORT, Execution(convolution="auto"))


def test_a_shared_kernel_is_run_by_chunks():
    model = awake("direction:shared")
    with torch.no_grad():
        expected = model(*inputs())
        for block in model.blocks:
            block.ssm.convolution = way("chunked")
        ready = model.prepare(64)
        for prepared in (None, ready):
            found = model(*inputs(), prepared)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ALL)
def test_kept_kernels_change_nothing(variant):
    model, given = awake(variant), inputs()
    with torch.no_grad():
        plain = model(*given)
        if hasattr(model, "cached_kernels"):
            with model.cached_kernels():
                assert torch.allclose(model(*given), plain, atol=1e-5)
                assert torch.allclose(model(*given), plain, atol=1e-5)
    assert plain.shape == (2, 2, 8, 8) and plain.isfinite().all()


def test_taps_are_a_convolution_that_sees_so_far_and_no_further():
    torch.manual_seed(0)
    layer = BidirectionalSSM(3, 4)
    layer.forward_kernel, layer.backward_kernel = Taps(3, 5), Taps(3, 5)
    u = torch.randn(1, 20, 3)
    taps = layer.forward_kernel.taps
    seen = [u[0, 10 - lag] * taps[:, lag] for lag in range(5)]
    expected = sum(seen) + layer.skip[:3] * u[0, 10]
    assert torch.allclose(layer(u)[0, 10, :3], expected, atol=1e-5)
    far = u.clone()
    far[:, :6] += 1
    assert torch.allclose(layer(far)[:, 10:, :3], layer(u)[:, 10:, :3], atol=1e-5)
    assert torch.equal(Taps(3, 9)(4), Taps(3, 9)(4)) is False
    assert Taps(3, 9)(4).shape == (3, 4) and not Taps(3, 0)(6).any()


def test_without_mixing_groups_do_not_see_each_other():
    model, (x, t, y) = awake("taps:0"), inputs()
    changed = x.clone()
    changed[..., 0, 0] += 1
    with torch.no_grad():
        differs = (model(x, t, y) - model(changed, t, y)).abs().sum((0, 1)) > 1e-4
    assert differs[0, :2].all() and differs.sum() == 2  # the M places of its group


@pytest.mark.parametrize(
    ("variant", "sees"), [("forward", False), ("alternating", True)]
)
def test_reading_forward_the_last_pixel_reaches_no_other(variant, sees):
    model, (x, t, y) = awake(f"direction:{variant}"), inputs()
    changed = x.clone()
    changed[..., -1, -1] += 1
    with torch.no_grad():
        differs = (model(x, t, y) - model(changed, t, y)).abs().sum((0, 1)) > 1e-4
    assert differs[0, 0] == sees and differs[-1, -1]


def test_one_way_from_the_end_is_one_way_mirrored():
    torch.manual_seed(0)
    layer, u = OneWay(3, 4), torch.randn(2, 12, 3)
    forward = layer(u)
    layer.from_end = True
    assert torch.allclose(layer(u.flip(1)).flip(1), forward, atol=1e-5)


def test_a_shared_kernel_is_one_kernel():
    model = awake("direction:shared")
    layer = model.blocks[0].ssm
    assert torch.equal(layer.forward_kernel(9), layer.backward_kernel(9))
    both, one = (count_parameters(v, CONFIG) for v in ("", "direction:shared"))
    assert both - one == 2 * CONFIG.d_model * (1 + 2 * CONFIG.d_state)


@pytest.mark.parametrize("order", ["row", "snake", "hilbert"])
def test_an_order_visits_all_and_is_undone(order):
    assert sorted(places(order, 8, 8).tolist()) == list(range(64))
    # without mixing and groups, no order can change anything
    config = replace(CONFIG, downsample=1)
    torch.manual_seed(1)
    ordered = awake(f"order:{order}", config)
    plain = DiffuSSM(config).eval()
    plain.load_state_dict(ordered.state_dict())
    for model in (ordered, plain):
        for block in model.blocks:
            block.ssm.forward_kernel = block.ssm.backward_kernel = Taps(16, 0)
    with torch.no_grad():
        assert torch.allclose(ordered(*inputs()), plain(*inputs()), atol=1e-5)


PATHS = {  # of four rows of four, by hand
    "snake": "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12",
    "hilbert": "0 4 5 1 2 3 7 6 10 11 15 14 13 9 8 12",
}


@pytest.mark.parametrize("order", PATHS)
def test_the_sequence_is_the_path(order):
    config = replace(CONFIG, input_size=4)
    path = [int(place) for place in PATHS[order].split()]
    assert sorted(path) == list(range(16))
    ordered, plain = awake(f"order:{order}", config), DiffuSSM(config).eval()
    plain.load_state_dict(ordered.state_dict())
    x, t, y = inputs()
    x = x[..., :4, :4]
    walked, expected = torch.empty(2, 1, 16), torch.empty(2, 2, 16)
    for place, pixel in enumerate(path):
        walked[..., place] = x.flatten(2)[..., pixel]
    with torch.no_grad():
        out = plain(walked.view(2, 1, 4, 4), t, y).flatten(2)
        for place, pixel in enumerate(path):
            expected[..., pixel] = out[..., place]
        found = ordered(x, t, y).flatten(2)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, plain(x, t, y).flatten(2), atol=1e-2)


def test_rows_are_the_order_of_the_model():
    model = awake("order:row")
    plain = DiffuSSM(CONFIG).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(*inputs()), plain(*inputs()))


def test_a_fixed_variance_gets_no_gradient():
    from diffussm.diffusion import GaussianDiffusion

    model, (x, t, y) = awake("variance:fixed"), inputs()
    noise = torch.randn_like(x)
    loss = GaussianDiffusion.linear(1000).losses(model, x.clamp(-1, 1), t, y, noise)
    ours, simple = (
        torch.autograd.grad(loss[name].sum(), model.head.weight, retain_graph=True)[0]
        for name in ("loss", "mse")
    )
    assert torch.equal(ours, simple)


def test_the_transformer_starts_as_dit_does():
    torch.manual_seed(0)
    config = replace(CONFIG, d_model=64)
    model = network("attention:256", config)
    assert isinstance(model, DiT)
    for block in model.blocks:
        assert not block.modulation.weight.any() and block.mlp_in.weight.shape[0] == 256
        assert not any(linear.bias.any() for linear in (block.qkv, block.proj))
    assert not model.final_modulation.weight.any() and not model.head.weight.any()
    assert abs(float(model.embed_y.weight.detach().std()) - 0.02) < 0.002
    assert abs(float(model.embed_t[0].weight.detach().std()) - 0.02) < 0.002
    limit = (6 / (64 + 256)) ** 0.5
    assert (
        0.9 * limit < float(model.blocks[0].mlp_in.weight.detach().abs().max()) <= limit
    )


def test_the_sum_is_half_of_path_and_gate():
    block = awake("gate:sum").blocks[0]
    seen = {}
    for name in ("w1", "w2"):
        block.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out})
        )
    x, c = torch.randn(2, 32, 16), torch.randn(2, 16)
    with torch.no_grad():
        y = block(x, c)
        path, gate = (torch.nn.functional.gelu(seen[name]) for name in ("w2", "w1"))
        assert torch.allclose(y, x + block.w3((path + gate) / 2), atol=1e-5)
        assert not torch.allclose(y, x + block.w3(path * gate), atol=1e-2)


def test_widths_are_such_as_the_groups_and_the_positions_allow():
    sizes = {"d_model": 12, "downsample": 3, "input_size": (8, 6)}
    config = replace(CONFIG, **sizes, pos_embed="sincos")
    wanted = count_parameters("", replace(config, d_model=24))
    assert matched("", config, wanted)[1].d_model == 24
    with pytest.raises(ValueError, match="attention:1: .* not 2,000 to one percent"):
        matched("attention:1", CONFIG, 2000)


@pytest.mark.slow
def test_widths_match_to_one_percent_or_are_refused():
    digits = DiffuSSMConfig(**PRESETS["digits"])
    wanted = count_parameters("", digits)
    for variant in ("taps:9", "direction:shared", "attention:1"):
        found, sizes = matched(variant, digits, wanted)
        assert abs(count_parameters(found, sizes) / wanted - 1) <= 0.01
        assert found.split(":")[0] == variant.split(":")[0]
    with pytest.raises(ValueError, match="to one percent"):
        matched("", replace(CONFIG, downsample=8), count_parameters("", CONFIG) + 900)


def test_operations_are_those_of_what_is_computed():
    with_taps = image_macs("taps:7", CONFIG) - image_macs("taps:0", CONFIG)
    assert with_taps == 2 * 2 * 7 * 64 * 16
    assert image_macs("order:snake", CONFIG) == image_macs("", CONFIG)
    wide, narrow = (image_macs(f"attention:{h}", CONFIG) for h in (65, 64))
    assert wide - narrow == 2 * 64 * 2 * 16


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("tabs:3", "did you mean 'taps'"),
        ("taps:x", "expected a number"),
        ("taps:", "expected a number"),
        ("taps:65", "64 at most"),
        (":9", "expected a kind"),
        ("attention:0", "expected a number"),
        ("direction:backward", "forward"),
        ("start:lins", "lin"),
        ("order:spiral", "snake"),
        ("gate:max", "sum"),
        ("variance:free", "fixed"),
    ],
)
def test_other_names_are_refused(variant, told):
    with pytest.raises(ValueError, match=told):
        network(variant, CONFIG)
    with pytest.raises(ValueError, match="patch_size=1"):
        network("order:snake", replace(CONFIG, patch_size=2))
    with pytest.raises(ValueError, match="multiple of 4, for the 4 heads"):
        network("attention:9", replace(CONFIG, d_model=18))
    with pytest.raises(ValueError, match="power of 2"):
        network("order:hilbert", replace(CONFIG, input_size=(8, 6)))


def test_the_sum_recomputes_as_the_product_does(monkeypatch):
    seen, plain = [], recomputation.checkpoint
    monkeypatch.setattr(
        recomputation,
        "checkpoint",
        lambda *args, **how: seen.append(1) or plain(*args, **how),
    )
    model = network("gate:sum", CONFIG)
    model.activation_checkpointing = "all"
    t, y = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    model(torch.randn(1, 1, 8, 8), t, y)
    assert len(seen) == CONFIG.n_blocks
