"""What the model card says, and what it does not make up."""

import json
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
from pipelines import network, piped, small_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-shark"
    pipe = piped(vae=small_vae(), training={"step": 7, "data": "sharks", "flip": None})
    measured = {"how": {"steps": 250, "guidance": {"scale": 1.5}}}
    measured |= {"FID": 2.5, "precision": 0.75}
    pipe.save_pretrained(folder, license="cc-by-4.0", evaluation=measured)
    return SimpleNamespace(folder=folder, pipe=pipe)


def test_model_card_has_the_figures(saved):
    card = (saved.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: cc-by-4.0\n")
    parameters = sum(
        parameter.numel() for parameter in saved.pipe.denoiser.parameters()
    )
    for line in (
        "# tiny-shark",
        f"| parameters | {parameters:,} |",
        "| d_model | 16 |",
        "| step | 7 |",
        "| FID | 2.5 |",
        "| precision | 0.75 |",
        "| how.guidance.scale | 1.5 |",
        "| 0 | great white shark, white shark |",
    ):
        assert line in card.splitlines()
    assert "flip" not in card and "@article{diffussm" in card
    call = re.search(r"pipe\((.+?)\)\.images", card).group(1)
    assert call.startswith("'great white shark, white shark', guidance_scale=1.5")


def test_scores_are_those_of_the_samples_and_no_settings(tmp_path):
    measured = {
        "samples": [{"name": "set", "frechet_distance": {"mean": 93.25}}],
        "real": {"frechet_distance": {"mean": 7.5}},
        "kid": {"mean": 0.125},
        "protocol": {"kid": {"seed": 3}},
    }
    piped().save_pretrained(tmp_path, evaluation=measured)
    card = (tmp_path / "README.md").read_text()
    scores, how = card.split("What was measured, and how:")
    for line in ("samples.frechet_distance.mean | 93.25 |", "kid.mean | 0.125 |"):
        assert line in scores
    for line in ("real.frechet_distance.mean | 7.5 |", "protocol.kid.seed | 3 |"):
        assert line in how and line not in scores


def test_model_card_does_not_invent_figures(tmp_path):
    piped().save_pretrained(tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "Not measured." in card and "Not recorded." in card and "not stated" in card
    assert "clip_denoised" not in card  # which latents cannot be
    assert 'num_inference_steps=250, output_type="latent").images[0]' in card
    piped(network(in_channels=1)).save_pretrained(tmp_path / "pixels")
    pixels = (tmp_path / "pixels" / "README.md").read_text()
    assert "pass `clip_denoised=True`" in pixels
    assert "image = pipe(" in pixels and "output_type" not in pixels
    assert "license:" not in card


def test_evaluation_is_read_from_its_file(tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"fid": 9.25, "reference": {"sha256": "abc"}}))
    piped().save_pretrained(tmp_path / "scored", evaluation=result, name="Scored")
    card = (tmp_path / "scored" / "README.md").read_text()
    assert (
        "| fid | 9.25 |" in card
        and "| reference.sha256 | abc |" in card
        and "# Scored" in card
    )
    result.write_text("FID: 9")
    with pytest.raises(ValueError, match="the evaluation .*result.json is damaged"):
        piped().save_pretrained(tmp_path / "broken", evaluation=result)
    with pytest.raises(FileNotFoundError):
        piped().save_pretrained(tmp_path / "broken", evaluation=tmp_path / "none.json")
    assert not (tmp_path / "broken").exists()
