"""What decides a sample: options that are refused when they are made, and recorded."""

import subprocess
import sys
from dataclasses import replace

import pytest

from diffussm.model_config import DiffuSSMConfig
from diffussm.sample_options import SAMPLE_PRESETS, Sampler, SampleSet

MODEL = DiffuSSMConfig(
    input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=2, d_state=4
)
QUICK = Sampler(3, "ddim", cfg_scale=1.5, guidance_channels=3)
FEW = SampleSet(count=10, labels="balanced", batch_size=4, sampler=QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"method": "euler"}, "method='euler': expected 'ddpm' or 'ddim'"),
        ({"eta": 0.5}, "eta belongs to 'ddim'"),
        ({"cfg_scale": float("nan")}, "cfg_scale=nan"),
        ({"guidance_channels": 0}, "guidance_channels=0"),
        ({"clip_denoised": "yes"}, "clip_denoised='yes': expected true or false"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


def test_what_does_not_apply_to_a_model_is_not_in_its_record():
    conditional, latents = MODEL, replace(MODEL, in_channels=4)
    paper = SampleSet()
    assert paper.of(latents).sampler.guidance_channels == 3
    one = paper.of(conditional).sampler
    assert one.guidance_channels is None  # one channel: all of it
    plain = SAMPLE_PRESETS["paper-fid-unguided"].of(latents).sampler
    assert plain.guidance_channels is None
    unconditional = paper.of(replace(latents, num_classes=0)).sampler
    assert unconditional.cfg_scale == 1.0 and unconditional.guidance_channels is None
    for model, has in ((conditional, 10), (replace(conditional, num_classes=0), 0)):
        with pytest.raises(ValueError, match=f"this model has {has}"):
            replace(paper, classes=(3, 10)).of(model)


def test_presets_are_the_papers():
    paper = SAMPLE_PRESETS["paper-fid"]
    how = Sampler(steps=250, method="ddpm", cfg_scale=1.5, guidance_channels=3)
    assert (paper.count, paper.sampler) == (50_000, how)
    assert (paper.labels, paper.classes) == ("random", None)  # as DiT's code
    both = SAMPLE_PRESETS["paper-fid-all"]
    all_channels = replace(how, guidance_channels=None)
    assert both == replace(paper, labels="balanced", sampler=all_channels)
    unguided = replace(paper, sampler=replace(how, cfg_scale=1.0))
    assert SAMPLE_PRESETS["paper-fid-unguided"] == unguided


def test_the_record_has_the_flat_keys_of_earlier_versions():
    record = FEW.record(10)
    assert set(record) == set(
        "count labels classes steps method cfg_scale guidance_channels clip_denoised "
        "precision batch_size seed".split()
    )
    assert record["steps"] == 3 and FEW.record(0)["labels"] == "none"
    noisy = replace(FEW, sampler=replace(QUICK, eta=0.5))
    assert noisy.record(10)["eta"] == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        *({"count": 0}, {"labels": "mine"}, {"precision": "fp8"}, {"seed": -1}),
        *({"classes": ()}, {"classes": (3, -1)}, {"classes": (3, 3)}),
    ],
)
def test_sample_options_that_cannot_work_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(FEW, **changes)


def test_they_do_without_torch():
    code = "import sys, diffussm.sample_options; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
