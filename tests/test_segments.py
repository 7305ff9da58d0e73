"""Ch. "Few images, long sequences": whole and in segments, the same function."""

import pytest
import torch
from machine_code import compile_elsewhere

pytest.importorskip("triton", reason="Triton is not made for this system")

from test_chunked_kernels import agree, errors, some_modes

from diffussm import chunked_kernels, segments
from diffussm.traffic import Traffic


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "B, length, D, n, chunk, pieces",
    [(1, 128, 2, 4, 16, 2), (3, 256, 3, 17, 16, 4), (1, 1024, 1, 32, 64, 4)],
)
def test_segments_equal_the_two_sums(B, length, D, n, chunk, pieces):
    """What a segment is given, forwards, for the adjoint, and for the modes."""
    assert segments.segments(B, length, chunk) == pieces
    agree(errors(B, length, D, n, precision="ieee", chunk=chunk, warps=4))


def test_a_sequence_is_cut_where_rows_are_empty():
    cut = segments.segments
    assert [cut(B, 16384, 16) for B in (1, 2, 3, 16, 17)] == [32, 16, 8, 2, 1]
    assert [cut(1, L, 16) for L in (64, 100, 128, 1008, 1024)] == [1, 1, 2, 1, 16]
    assert cut(1, 1024, 64) == 4


@pytest.mark.parametrize("images, pieces", [(17, 1), (2, 4)])
def test_six_launches_and_six_more_in_segments(monkeypatch, images, pieces):
    launched = []
    for name in ("powers", "walk", "modes", "carry"):

        def note(grid, name=name):
            return lambda *_, **__: launched.append(name)

        spy = type("Spy", (), {"__getitem__": lambda _, grid, note=note: note(grid)})
        home = chunked_kernels if name == "powers" else segments
        own = "_" if name in ("powers", "carry") else ""
        monkeypatch.setattr(home, f"{own}{name}_kernel", spy())
    assert segments.segments(images, 256, 16) == pieces
    u, grad = torch.randn(images, 256, 3), torch.randn(images, 256, 6)
    modes = some_modes(3, 2)
    ops = segments._chunked_triton, segments._chunked_triton_backward
    with (
        Traffic() as seen
    ):  # which does not look into an operator: the functions themselves
        ops[0]._init_fn(u, modes, "ieee", 16, 8)
        ops[1]._init_fn(grad, u, modes, "ieee", 16, 8)
    walk, modes = (
        [name] if pieces == 1 else [name, "carry", name] for name in ("walk", "modes")
    )
    assert launched == ["powers", *walk, "powers", *walk, *modes]
    assert [one.name for one in seen.work] == ["sum"]


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from diffussm import segments

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

launched, run = [], JITFunction.run

def compile_only(kernel, *args, warmup, **options):
    launched.append(kernel.__name__)
    return run(kernel, *args, warmup=True, **options)

driver.set_active(Driver())
JITFunction.run = compile_only
modes = torch.zeros(2, 32, 17)
for kind, images, length in (("bf16", 17, 100), ("bf16", 2, 256), ("tf32x3", 2, 256)):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    u, grad = (torch.zeros(images, length, D, dtype=dtype) for D in (32, 64))
    segments._chunked_triton._init_fn(u, modes, kind, 16, 4)
    segments._chunked_triton_backward._init_fn(grad, u, modes, kind, 16, 4)
assert len(launched) == 5 + 11 + 11, launched
print("compiled")
"""


@pytest.mark.slow
def test_every_launch_compiles_as_it_is_launched(tmp_path):
    """With the dtypes and sizes of a call, whole and in segments, without a GPU."""
    compile_elsewhere(LAUNCH, tmp_path)
