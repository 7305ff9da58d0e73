"""What tests of Triton's kernels share without a GPU: an interpreter that rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def round_to_nearest(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Triton's interpreter cuts bfloat16 off and multiplies its bits; here it rounds
    as hardware does, and multiplies the numbers. `patch` sets an attribute.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def to_nearest(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding_mode)
        nearest = torch.from_numpy(x.astype("float32")).bfloat16()
        return nearest.view(torch.int16).numpy().astype("uint16")

    def of_values(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (
            builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(builder, a, b, d, *options)

    patch(interpreter, "_convert_float", to_nearest)
    patch(interpreter.InterpreterBuilder, "create_dot", of_values)
