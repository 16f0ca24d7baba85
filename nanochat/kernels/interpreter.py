"""bfloat16 in Triton's interpreter: round-to-nearest casts, and dot products of the values.

Triton 3.6 keeps bfloat16 as raw uint16 bits there: a cast to it truncates, and `tl.dot` multiplies
the bits. Kernels do arithmetic in float32 only, so casts and dots are all that must be mended.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits (uint16) of the float32 values, rounded to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).bfloat16()
    return rounded.view(torch.uint16).numpy()


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _values(handle: Any) -> np.ndarray:
    return from_bfloat16(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    target = dst_type.scalar
    values = _values(src)
    data = to_bfloat16(values) if target == tl.bfloat16 else values.astype(_numpy_dtype(target))
    return interpreter.TensorHandle(data, target)


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    return interpreter._get_np_dtype(dtype)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> Any:
    product = np.matmul(_values(a), _values(b), dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


def mend() -> None:
    """Give the interpreter these casts and dots. Calling it again changes nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if builder.create_dot is _dot:
        return
    builder.cast_impl = _cast
    builder.create_dot = _dot
    # fp8 and explicit rounding modes keep the interpreter's own conversion
    original = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        wide = {tl.bfloat16, tl.float16, tl.float32, tl.float64}
        if {src.dtype.scalar, dst_type.scalar} <= wide:
            return _cast(self, src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp
