"""What a guard lets through, what it refuses, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from diffussm.guards import (
    bounded,
    check_fields,
    differences,
    expect,
    expect_empty,
    expect_finite,
    expect_indices,
    expect_int,
    expect_number,
    expect_one_of,
    expect_real,
    expect_same,
    expect_there,
    explain,
    from_dict,
    refuse,
)


@dataclass(frozen=True)
class Inner:
    width: int = bounded(8, least=1)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Config:
    name: str
    steps: int = bounded(10, least=1)
    rate: float = bounded(0.1, above=0, below=1, note="e.g. 1.0e-4")
    kind: Literal["a", "b"] = "a"
    keep: tuple[str, ...] = ()
    size: int | tuple[int, int] = 8
    limit: int | None = bounded(None, least=3)
    fast: bool = False
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check_fields(self)


def test_shapes_give_their_sizes() -> None:
    assert expect("u", torch.zeros(2, 3, 4), "B L D", D=4) == (2, 3, 4)
    assert expect("s", np.zeros((2, 64, 9)), "2 D _", D=64) == (2, 64, 9)
    assert expect("t", torch.tensor(0), "") == ()


@pytest.mark.parametrize(
    ("shape", "pattern", "sizes"),
    [
        ((2, 8), "B L D", {}),
        ((2, 8, 4), "B L", {}),
        ((2, 8, 4), "B L D", {"D": 3}),
        ((3, 8, 4), "2 L D", {}),
        ((2, 8, 4), "B L L", {}),
    ],
)
def test_other_shapes_are_refused_in_words(
    shape: tuple[int, ...], pattern: str, sizes: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="u has shape .* expected") as caught:
        expect("u", torch.zeros(shape), pattern, **sizes)
    assert str(shape) in str(caught.value)
    for name, size in sizes.items():
        assert f"{name}={size}" in str(caught.value)


def test_what_has_no_shape_is_refused() -> None:
    with pytest.raises(TypeError, match=r"u is \[1, 2\]: expected a tensor \(B\)"):
        expect("u", [1, 2], "B")


def test_numbers_are_numbers_and_in_range() -> None:
    assert expect_int("n", np.int64(3), least=3, most=3) == 3
    assert isinstance(expect_int("n", np.int64(3)), int)
    assert expect_number("x", 1, least=0) == 1.0
    for value in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="n="):
            expect_int("n", value)
    with pytest.raises(ValueError, match="n=2: expected an integer from 3 to 4"):
        expect_int("n", 2, least=3, most=4)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="expected a finite number of at least 0"):
            expect_number("x", wrong, least=0)


def test_the_nearest_name_is_given() -> None:
    assert expect_one_of("method", "ddim", ["ddpm", "ddim"]) == "ddim"
    with pytest.raises(ValueError, match="did you mean 'ddpm'"):
        expect_one_of("method", "ddpn", ["ddpm", "euler"])


def test_only_real_floating_tensors_are_real() -> None:
    expect_real(u=torch.zeros(1), h=torch.zeros(1, dtype=torch.bfloat16))
    for wrong in (
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1).to(torch.cfloat),
        3,
    ):
        with pytest.raises(TypeError, match="k is .* expected a real"):
            expect_real(u=torch.zeros(1), k=wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0: expected an integer of at least 1"),
        ({"steps": 1.5}, "steps=1.5: expected an integer"),
        ({"steps": True}, "steps=True"),
        ({"rate": 1.0}, "rate=1.0: expected a number above 0 and below 1; e.g. 1.0e-4"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"kind": "c"}, "kind='c': expected 'a' or 'b'"),
        ({"keep": "abc"}, "keep='abc': expected a list of texts"),
        ({"keep": (1,)}, "keep="),
        ({"size": (1, 2, 3)}, "size="),
        ({"limit": 2}, "limit=2: expected none or an integer of at least 3"),
        ({"fast": 1}, "fast=1: expected true or false"),
        ({"inner": {"width": 0}}, "width=0"),
        ({"inner": 3}, "inner=3"),
        ({"step": 3}, "unknown key 'step' in a config; did you mean 'steps'"),
    ],
)
def test_a_configuration_says_what_is_wrong(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        from_dict(Config, {"name": "x", **given}, "a config")


def test_a_configuration_survives_json() -> None:
    config = Config("x", keep=("a",), size=(4, 8), limit=None, inner=Inner(3))
    back = from_dict(Config, json.loads(json.dumps(asdict(config))), "a config")
    assert back == config


def test_missing_keys_and_no_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match="a config lacks name"):
        from_dict(Config, {}, "a config")
    with pytest.raises(ValueError, match="a config is 3: expected names"):
        from_dict(Config, 3, "a config")


def test_a_condition_is_refused_with_its_sentence() -> None:
    refuse(False, "never said")
    with pytest.raises(ValueError, match="^L=3 is odd$"):
        refuse(True, "L=3 is odd")
    with pytest.raises(OSError, match="full"):
        refuse(True, "full", OSError)


def test_guards_need_no_torch() -> None:
    code = "import sys, diffussm.guards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_differences_name_both_sides() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == [
        "b (there 3, asked 2)"
    ]
    assert differences({"a": 1}, {}) == ["a (there None, asked 1)"]
    assert differences({"m": {"N": 4, "D": 8}}, {"m": {"N": 2, "D": 8}}) == [
        "m.N (there 2, asked 4)"
    ]
    assert differences({"m": {}}, {"m": None}) == ["m (there None, asked {})"]
    assert differences({"s": "ab" * 32}, {"s": "cd" * 32}) == [
        "s (there 'cdcdcdcdcdcd...', asked 'abababababab...')"
    ]
    (said,) = differences({"path": "/data/" * 10 + "here"}, {"path": None})
    assert "/data/" * 9 in said  # as long as a checksum, and none


def test_two_records_that_differ_are_refused() -> None:
    expect_same("RUN differs in", {"a": 1}, {"a": 1}, "Choose another.")
    with pytest.raises(
        ValueError, match=r"^RUN differs in a \(there 2, asked 1\)\. Ch"
    ):
        expect_same("RUN differs in", {"a": 1}, {"a": 2}, "Choose another.")


def test_indices_are_integers_in_range() -> None:
    for fine in ([0, 9], []):
        expect_indices("t", torch.tensor(fine, dtype=torch.int32), 10)
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="t is .*: expected integers from 0 to 9"):
            expect_indices("t", wrong, 10)
    for values in ([-1, 3], [0, 10]):
        with pytest.raises(ValueError, match="t reaches from .*: expected 0 to 9"):
            expect_indices("t", torch.tensor(values), 10)
    with torch.device("meta"):  # has no values to look at
        expect_indices("t", torch.tensor([99]), 10)


def test_numbers_that_are_not_finite_are_counted() -> None:
    x = torch.zeros(4, 2)
    expect_finite("x", x, "look")
    x[1, 0], x[3, 1] = torch.inf, torch.nan
    with pytest.raises(
        FloatingPointError, match=r"^x: .* in 2 of 4 \(at 1, 3\); look$"
    ):
        expect_finite("x", x, "look", FloatingPointError)


def test_a_cause_is_told_after_our_words(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"^the recipe: '1' is odd$") as caught,
        explain("the recipe", ValueError, error=OSError),
    ):
        raise ValueError("'1' is odd")
    assert isinstance(caught.value.__cause__, ValueError)
    told = "^the recipe: KeyError$"
    with pytest.raises(ValueError, match=told), explain("the recipe", KeyError):
        raise KeyError
    told = "^of another kind$"
    with pytest.raises(TypeError, match=told), explain("the recipe", ValueError):
        raise TypeError("of another kind")
    assert expect_there(tmp_path, "a folder") == tmp_path
    with pytest.raises(FileNotFoundError, match="there is no .*/x: expected a file"):
        expect_there(tmp_path / "x", "a file")


def test_a_new_folder_replaces_nothing(tmp_path: Path) -> None:
    for free in (tmp_path, tmp_path / "new"):
        expect_empty(free)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is no album: nothing was written"):
            expect_empty(taken, "no album")
