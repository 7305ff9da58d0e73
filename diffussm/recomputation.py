"""What is kept.

Generated from book/23_recomputation.md by `make export`: edit there.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from diffussm.hourglass import HourglassBlock

__all__ = ["Recompute", "RecomputingBlock", "kept_by", "kept_by_kernels"]


Recompute = Literal["none", "elementwise", "all"]  # what of a block

_ATEN = torch.ops.aten
_PRODUCTS = [
    product.default for product in (_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm)
]


def _policy(_: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    expensive = operation in _PRODUCTS or operation.namespace == "diffussm"
    keep, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    return keep if expensive else again


class RecomputingBlock(HourglassBlock):
    """An hourglass block whose backward pass computes again what was not kept."""

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        prepared: Tensor | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """As `HourglassBlock.forward`; the same values and gradients for any way."""
        if recompute == "none" or not torch.is_grad_enabled():
            return super().forward(x, c, prepared)
        how = {"use_reentrant": False, "preserve_rng_state": False, **_HOW[recompute]}
        y: Tensor = checkpoint(super().forward, x, c, prepared, **how)
        return y


_HOW: dict[Recompute, dict[str, Any]] = {
    "all": {},
    "elementwise": {
        "context_fn": partial(create_selective_checkpoint_contexts, _policy)
    },
}


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is made within it: `made`, a reference, its bytes and its maker."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), options: Any = None
    ) -> Any:
        """Run the operation; a view is no new memory, and not noted again."""
        result = operation(*args, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                reference = StorageWeakRef(memory)  # type: ignore[no-untyped-call]
                entry = reference, memory.nbytes(), operation.__name__
                self.made.setdefault(memory._cdata, entry)
        return result

    def left(self, known: set[int]) -> Iterator[tuple[str, int]]:
        """Maker and bytes of what is still there and not `known`."""
        for key, (memory, size, maker) in self.made.items():
            gone = memory.expired()  # type: ignore[no-untyped-call]
            if key not in known and not gone:
                yield maker, size


def kept_by(
    config: Any, precision: str, images: int, recompute: Recompute
) -> Counter[str]:
    """What a block keeps for its backward pass: bytes, by the operation that made it.

    The entry "input" is the stream that it was given; what is prepared of the
    weights is not counted. Nothing is allocated.
    """
    with FakeTensorMode(), _Made() as noted:
        block = RecomputingBlock(config.d_model, config.d_state, config.downsample)
        J, D = config.seq_len // config.downsample, config.d_model
        x, c = torch.zeros(images, J, D, requires_grad=True), torch.zeros(images, D)
        ready = block.ssm.prepare(config.seq_len).detach().requires_grad_()
        given = x, c, ready, *block.parameters()
        known = {t.untyped_storage()._cdata for t in given}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = block(x, c, ready, recompute)
        known.add(y.untyped_storage()._cdata)  # the next block's input
        kept = Counter({"input": x.untyped_storage().nbytes()})
        for maker, size in noted.left(known):
            kept[maker] += size
    return kept


def kept_by_kernels(config: Any) -> float:
    """Bytes that preparing a block's convolution once adds to what a step keeps."""
    with FakeTensorMode(), _Made() as noted:
        layer = RecomputingBlock(config.d_model, config.d_state, config.downsample).ssm
        own = {p.untyped_storage()._cdata for p in layer.parameters()}
        ready = layer.prepare(config.seq_len)
        kept = sum(size for _, size in noted.left(own))
    return float(kept + ready.nbytes)  # and the gradient of what is ready
