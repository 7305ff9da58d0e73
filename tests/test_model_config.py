"""Ch. "The sizes of a model": ranges, presets, and what does not fit together."""

import json

import pytest

from diffussm.model_config import PRESETS, DiffuSSMConfig, read_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_modle": 64}, "unknown key 'd_modle'.*did you mean 'd_model'"),
        ({"d_model": 64.0}, "d_model=64.0: expected an integer"),
        ({"n_blocks": True}, "n_blocks=True"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"d_state": 7}, "d_state=7 is odd"),
        ({"input_size": [3, 3]}, "downsample=2 does not divide the 9 positions"),
        ({"input_size": (4, 4, 4)}, "input_size"),
        ({"input_size": "32"}, "input_size='32'"),
        ({"input_size": 9, "patch_size": 2}, "patch_size=2 does not divide"),
        ({"downsample": 5, "input_size": 5}, "downsample=5 does not divide 2"),
        ({"label_dropout": 1.5}, "label_dropout=1.5"),
        ({"pos_embed": "rotary"}, "pos_embed='rotary'"),
        ({"pos_embed": "sincos", "d_model": 18}, "multiple of 4"),
        ([1, 2], "expected names with values"),
    ],
)
def test_configurations_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DiffuSSMConfig.from_dict(values)


def test_configuration_survives_json():
    config = DiffuSSMConfig(input_size=(4, 6), d_model=8)
    again = DiffuSSMConfig.from_dict(json.loads(json.dumps(config.__dict__)))
    assert (
        again == config and again.input_size == (4, 6) and hash(again) == hash(config)
    )
    assert (again.height, again.width, again.seq_len) == (4, 6, 24)


def test_xl_is_the_papers():
    xl = DiffuSSMConfig(**PRESETS["DiffuSSM-XL"])
    assert (xl.d_model, xl.n_blocks, xl.downsample, xl.seq_len) == (1152, 29, 2, 1024)
    assert DiffuSSMConfig(**PRESETS["DiffuSSM-XL/2"]).seq_len == 256


def test_a_configuration_is_read_from_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"input_size": [4, 6], "d_model": 8}))
    assert read_config(path) == DiffuSSMConfig(input_size=(4, 6), d_model=8)
    path.write_text(json.dumps({"d_state": 7}))
    with pytest.raises(
        ValueError, match=r"config\.json is not the conf.*d_state=7 is odd"
    ):
        read_config(path)
