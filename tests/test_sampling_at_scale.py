"""Sampling at scale: what may be rounded, what is prepared once, batches that fit."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from commands import diffussm

from diffussm import autotuning, sampling_at_scale, variants
from diffussm.bidirectional import way
from diffussm.denoiser import Denoiser
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import Execution, diffusion_of
from diffussm.pictures import computing_in
from diffussm.pretrained import load_pretrained
from diffussm.sample_options import SAMPLE_PRESETS, Sampler, SampleSet
from diffussm.samples import draw_batch
from diffussm.sampling import guided, sample
from diffussm.sampling_at_scale import (
    even_batch,
    fitting_batch,
    largest_batch,
    make_ready,
    replay,
)

CPU = torch.device("cpu")
SMALL = DiffuSSMConfig(
    input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=2, d_state=4
)
DIFFUSION = GaussianDiffusion.linear(50)
FEW = SampleSet(count=6, batch_size=3, sampler=Sampler(3, cfg_scale=1.5))


def network(config=SMALL):
    torch.manual_seed(0)
    model = DiffuSSM(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    for block in model.blocks:
        torch.nn.init.normal_(block.w3.weight, std=0.2)
    return model


def trained():
    box = load_pretrained("digits")
    return box.model().eval(), diffusion_of(box.recipe)


def errors_of_guidance(model, diffusion, cfg_scale):
    """Of each of eight steps: how far bf16 is from float32 in what a step is given, and
    in the difference that guidance magnifies, relative to its size.
    """
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y, chain = torch.arange(6), diffusion.respace(8)
    found = []
    for t in chain.timestep_map.flip(0)[
        :-1
    ]:  # the last has hardly any noise to predict
        level, seen = torch.full((6,), int(t)), {}
        for precision in ("float32", "bf16"):
            with torch.no_grad(), computing_in(precision, CPU):
                on, off, out = (
                    guided(model, scale)(x, level, y)[:, :1]
                    for scale in (1, 0, cfg_scale)
                )
            assert out.dtype == torch.float32
            seen[precision] = on - off, out
        pairs = zip(seen["bf16"], seen["float32"], strict=True)
        found.append([float((a - b).norm() / b.norm()) for a, b in pairs])
        ab = diffusion.alphas_cumprod[t].float()
        x0 = ((x - (1 - ab).sqrt() * seen["float32"][1]) / ab.sqrt()).clamp(-1, 1)
        x = ab.sqrt() * x0 + (1 - ab).sqrt() * seen["float32"][1]
    return torch.tensor(found).amax(0).tolist()


def test_bf16_is_close_enough_with_a_head_in_float32_and_not_with_one_in_bf16(
    monkeypatch,
):
    """The bounds are those of ch. "Sampling at scale"."""
    model, diffusion = trained()
    difference, out = errors_of_guidance(model, diffusion, 1.5)
    assert difference < 0.2 and out < 0.01
    honest = DiffuSSM._decode

    def rounded(self, x, c):
        return honest(self, x, c).bfloat16().float()

    monkeypatch.setattr(DiffuSSM, "_decode", rounded)
    difference, _ = errors_of_guidance(model, diffusion, 1.5)
    assert difference > 0.2


def test_a_pipeline_within_autocast_has_its_head_in_float32():
    model, _ = trained()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([9, 99]), torch.tensor([0, 1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = Denoiser.of(model)(x, t, y)
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())  # nor was it rounded before


def test_presets_draw_in_bf16_on_a_gpu_and_in_float32_elsewhere():
    for name, wanted in SAMPLE_PRESETS.items():
        scale = name.startswith("paper")
        assert wanted.on("cuda").precision == ("bf16" if scale else "float32")
        assert wanted.on("cpu").precision == "float32"
    asked = replace(SAMPLE_PRESETS["paper-fid"], precision="tf32")
    assert asked.on("cuda") == asked.on("cpu") == asked


@pytest.mark.parametrize("room", [0, 1, 2, 15, 16, 100, 1000, 5000])
def test_a_batch_that_fits_is_found(room):
    tried = []

    def fits(images):
        tried.append(images)
        return images <= room

    if not room:
        with pytest.raises(MemoryError, match="not even one image"):
            largest_batch(fits)
        return
    found, most = largest_batch(fits), min(room, 1024)
    assert 1 <= found <= max(1, 0.9 * most) and found >= int(0.9 * most / 1.13) - 1
    assert len(tried) < 12 and max(tried) <= 1024


def test_a_set_for_a_gpu_takes_what_fits_and_a_cpu_the_default(monkeypatch):
    asked = []

    def crowded(model, diffusion, wanted, indices, *, device, decode):
        asked.append((wanted.batch_size, len(indices), wanted.sampler.steps))
        if len(indices) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling_at_scale, "draw_batch", crowded)
    model, open_ = network(), replace(FEW, batch_size=0)
    assert fitting_batch(model, DIFFUSION, open_, CPU) == 64 and not asked
    found = fitting_batch(model, DIFFUSION, open_, torch.device("meta"))
    assert 28 <= found <= 36 and all(a == b and steps == 1 for a, b, steps in asked)


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_no_process_draws_more_than_its_share(processes):
    for count in (1, 7, 100, 5000):
        for most in (1, 32, 921):
            batch = even_batch(count, most, processes)
            batches = -(-count // batch)
            rounds = -(-batches // processes)
            assert 1 <= batch <= most
            fewest = -(-count // (most * processes))
            assert rounds == fewest and (batch - 1) * rounds * processes < count


def test_a_trial_is_a_batch_of_one_step():
    one = replace(FEW, sampler=replace(FEW.sampler, steps=1))
    images = draw_batch(network(), DIFFUSION, one, range(3), device=CPU)
    assert images.shape == (3, 8, 8, 3)


class Played(sampling_at_scale._Replayed):
    """A graph as a function of Python: what it reads and writes stays where it is."""

    device = "cpu"

    def __init__(self, model):
        super().__init__(model)
        self.recorded, self.replayed = 0, 0

    def _record(self, inputs, kept):
        self.recorded += 1
        self.inputs = [one.clone() for one in inputs]
        y = self.inputs[2] if len(inputs) > 2 else None
        once = partial(self.forward, *self.inputs[:2], y, kept)
        self.output = once()

        def again():
            self.replayed += 1
            self.output.copy_(once())

        self.graph = SimpleNamespace(replay=again)


@pytest.mark.parametrize("classes", [10, 0])
def test_a_replayed_model_draws_what_the_model_draws(classes):
    model = network(replace(SMALL, num_classes=classes))
    fast = copy.deepcopy(model)
    played = vars(fast)["forward"] = Played(fast)

    def drawn(one, seed):
        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        how = {"cfg_scale": 1.5 if classes else 1.0, "noise": noise, "progress": False}
        how["generator"] = torch.Generator().manual_seed(seed)
        return sample(one, DIFFUSION, [1, 2, 3, 4] if classes else None, 5, **how)

    for seed in (0, 1):
        assert torch.equal(drawn(fast, seed), drawn(model, seed))
    assert played.replayed == 2 * 5 and played.recorded == 2  # kernels of each chain


def test_a_replayed_model_is_never_stale():
    model = network()
    played = vars(model)["forward"] = Played(model)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 1])
    with torch.no_grad(), model.cached_kernels():
        first = model(x, t, y)
        again = model(x, t, y)
        assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
        for change in ("ssm.forward_kernel.C", "w0.weight"):
            model.get_parameter(f"blocks.1.{change}").data.mul_(1.1)
            plain = DiffuSSM(SMALL)
            plain.load_state_dict(model.state_dict())
            now = model(x, t, y)
            assert torch.equal(now, plain(x, t, y)) and not torch.equal(now, first)
            first = now
        assert played.recorded == 2
        model(x[:1], t[:1], y[:1])  # another shape
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x[:1], t[:1], y[:1])
            assert torch.equal(half, plain(x[:1], t[:1], y[:1]))
        assert played.recorded == 4
        with torch.autocast("cpu", torch.float16):
            assert not torch.equal(model(x[:1], t[:1], y[:1]), half)
        model(x[:1], t[:1], y[:1])
        between = model(x[:1], t[:1] + 0.5, y[:1])  # a time that is no integer
        assert torch.equal(between, plain(x[:1], t[:1] + 0.5, y[:1]))
        assert played.recorded == 7
        ready = model.prepare(64)
        assert torch.equal(model(x, t, y, prepared=ready), plain(x, t, y))
    count = played.replayed
    model(x, t, y)  # nothing is kept, and there are gradients
    with torch.no_grad():
        model(x, t, [0, 1])
    assert played.replayed == count


def test_a_network_is_made_ready_as_it_is_for_training(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda one: compiled.append(one))
    model = network()
    how = Execution(convolution="reference", compile=True)
    monkeypatch.setattr("diffussm.parallel.compiler_lacking", lambda device: "")
    ready = make_ready(model, DIFFUSION, replace(FEW, batch_size=0), how, CPU)
    assert ready == replace(FEW, batch_size=6) and compiled == list(model.blocks)
    assert all(block.ssm.convolution == way("reference") for block in model.blocks)
    assert "forward" not in vars(model)  # a graph is for a GPU
    with pytest.raises(ValueError, match="convolution='none'"):
        make_ready(model, DIFFUSION, FEW, Execution(convolution="none"), CPU)


def test_a_variant_draws_by_the_fft_where_auto_has_chosen_what_it_cannot(monkeypatch):
    asked = []

    def choose(*question, **work):
        asked.append(work)
        return SimpleNamespace(convolution=way("chunked"), reason="it won")

    monkeypatch.setattr(autotuning, "autotune_convolution", choose)
    variant = variants.network("taps:5", SMALL)
    how = Execution(convolution="auto")
    assert make_ready(variant, DIFFUSION, FEW, how, CPU) == FEW
    assert variant.blocks[0].ssm.convolution == way("fft")
    assert asked == [{"d_state": SMALL.d_state, "backward": False}]


def test_the_command_takes_the_words_of_training(work, tmp_path):
    words = f"sample --from {work}/digits --steps 2 --device cpu --count 3 --out "
    for name, more in (("a", ""), ("b", "--convolution reference --batch_size 0")):
        diffussm(f"{words}{tmp_path}/{name} --batch_size 2 {more}")
    for name in ("a", "b"):
        assert len(list((tmp_path / name).glob("*.png"))) == 3
    picture = f"sample --from {work}/digits --device cpu --grid {tmp_path}/x.png"
    assert "no effect for a picture" in diffussm(f"{picture} --compile true", 1)
    assert "convolution='fast'" in diffussm(
        f"{words}{tmp_path}/c --convolution fast", 1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_graph_draws_what_the_model_draws(precision):
    card = torch.device("cuda")
    model = network().to(card)
    fast = copy.deepcopy(model)
    replay(fast)
    wanted = replace(FEW, precision=precision)
    for first in (0, 3):
        batch = range(first, first + 3)
        with fast.cached_kernels():
            drawn = [
                draw_batch(one, DIFFUSION, wanted, batch, device=card)
                for one in (model, fast)
            ]
        assert abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    assert vars(fast)["forward"].graph is not None


@pytest.mark.gpu
def test_a_batch_that_fits_is_found_on_this_card():
    found = fitting_batch(
        network().cuda(), DIFFUSION, replace(FEW, batch_size=0), torch.device("cuda")
    )
    assert 1 <= found <= 921
