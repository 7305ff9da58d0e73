"""Where the bytes go.

Generated from book/76_traffic.md by `make export`: edit there.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffussm.fft_convolution import BODIES

__all__ = ["Work", "Traffic", "work_of", "Card", "seconds", "CARDS"]


@dataclass(frozen=True)
class Work:
    """One kernel: what it belongs to, its name, its operations, the bytes it moves.

    A multiply-add is two operations. Each operand counts once, as if a kernel read and
    wrote every number a single time.

    Source: ch. "Where the bytes go".
    """

    part: str
    name: str
    flops: float
    bytes: float


def _size(x: Tensor) -> int:
    lengths = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.element_size() * math.prod(lengths)


class Traffic(TorchDispatchMode):
    """Notes every kernel that PyTorch launches while it is active.

    Attributes:
        work: The kernels, in order.

    Source: ch. "Where the bytes go".
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Work] = []
        self._inside = ""  # the operator of ours that runs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and note it."""
        if func in BODIES:
            return self._enter(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        read = _tensors((args[1:] if name == "copy_" else args, kwargs))
        written = _tensors(out)
        memory = {x.untyped_storage()._cdata for x in read}
        view = any(x.untyped_storage()._cdata in memory for x in written)
        idle = (view and not func._schema.is_mutable) or name in _IDLE
        if not written or idle or func.namespace == "prim":
            return
        flops = _flops(func, args, kwargs, out)
        part = self._inside or ("linear maps" if flops else "element-wise")
        self.work.append(
            Work(part, name, flops, float(sum(map(_size, read + written))))
        )

    def _enter(self, func: Any, args: Any, kwargs: Any) -> Any:
        def note(name: str, moved: float) -> None:
            self.work.append(Work(self._inside, name, 0.0, float(moved)))

        outer, self._inside = self._inside, func.overloadpacket.__name__
        try:
            with self, _triton_launches(note):
                return BODIES[func](*args, **kwargs)
        finally:
            self._inside = outer


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


_IDLE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Operations of a product or of attention; 0 for everything else."""
    name, shapes = func.overloadpacket.__name__, [x.shape for x in _tensors(args)]
    known: Any = flop_counter
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return float(known.sdpa_flop_count(*shapes[:3]))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return float(known.sdpa_backward_flop_count(*shapes[:4]))
    count = known.flop_registry.get(func.overloadpacket)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


@contextmanager
def _triton_launches(note: Callable[[str, float], None]) -> Iterator[None]:
    """Call `note` with a kernel's name and bytes wherever one would be launched."""
    triton = sys.modules.get("triton.runtime.jit")
    if triton is None:
        yield
        return

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            name = getattr(getattr(kernel, "fn", kernel), "__name__", "kernel")
            name = " ".join([name, *(a for a in args if isinstance(a, str) and a)])
            once = {id(x): _size(x) for x in _tensors((args, kwargs))}
            note(name, sum(once.values()))

        return launch

    face, plain = triton.KernelInterface, triton.KernelInterface.__getitem__
    face.__getitem__ = launcher
    try:
        yield
    finally:
        face.__getitem__ = plain


def work_of(prepare: Callable[[], Callable[[], object]]) -> list[Work]:
    """The kernels of a job, counted without running it.

    Args:
        prepare: Makes the job, with all tensors that it starts from; is not counted.

    Source: ch. "Where the bytes go".
    """
    with FakeTensorMode():
        job = prepare()
        seen = Traffic()
        with seen:
            job()
    return seen.work


@dataclass(frozen=True)
class Card:
    """What a GPU reaches: operations and bytes per second, seconds for a launch."""

    flops: float
    bandwidth: float
    launch: float = 5e-6


def seconds(work: Iterable[Work], card: Card) -> float:
    """How long the kernels take at least, one after another: computed, not measured.

    Source: ch. "Where the bytes go", eq-traffic-seconds.
    """
    return sum(
        max(w.flops / card.flops, w.bytes / card.bandwidth, card.launch) for w in work
    )


CARDS = {
    "A100": Card(flops=271.2e12, bandwidth=0.867 * 2039e9),
    "H100": Card(flops=794.5e12, bandwidth=0.867 * 3350e9),
}
