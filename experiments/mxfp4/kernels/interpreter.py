"""Block-scaled products and 8-bit floats in Triton's interpreter.

Triton 3.6 has no `tl.dot_scaled` there, and its conversion to FP8 neither carries nor saturates.
Both get the meaning that compiled kernels have, next to the bfloat16 of nanochat's interpreter.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from experiments.mxfp4.numbers.layout import unpack_nibbles
from experiments.mxfp4.numbers.reference import decode_e2m1
from nanochat.kernels import interpreter as bfloat16

FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
ELEMENTS = {ir.ScaleDotElemTypeTY.E4M3: tl.float8e4nv, ir.ScaleDotElemTypeTY.E5M2: tl.float8e5}


def from_float8(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """float32 values of FP8 bits."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(FLOAT8[dtype]).float().numpy()


def to_float8(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Bits of float32 values, to nearest even, saturating as the cvt.satfinite of the GPU."""
    target = FLOAT8[dtype]
    limit = torch.finfo(target).max
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).clamp(-limit, limit).to(target).view(torch.uint8).numpy()


def _scales(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.float8e4nv:
        return from_float8(handle.data, tl.float8e4nv)
    bytes_ = torch.from_numpy(np.ascontiguousarray(handle.data))
    return bytes_.view(torch.float8_e8m0fnu).float().numpy()


def _operand(data: np.ndarray, scale: Any, element: Any) -> np.ndarray:
    """(rows, K) float32 values of codes, blocks along the last axis."""
    if element == ir.ScaleDotElemTypeTY.E2M1:
        codes = unpack_nibbles(torch.from_numpy(np.ascontiguousarray(data)))
        values = decode_e2m1(codes).numpy()
    else:
        values = from_float8(data, ELEMENTS[element])
    factors = _scales(scale)
    return values * factors.repeat(values.shape[-1] // factors.shape[-1], -1)


def _dot_scaled(
    self: Any, a: Any, a_scale: Any, a_element: Any, b: Any, b_scale: Any, b_element: Any,
    fast_math: bool, a_k_pack: bool, b_k_pack: bool, d: Any,
) -> Any:  # fmt: skip
    left = _operand(a.data, a_scale, a_element)
    right = _operand(b.data.T, b_scale, b_element)
    return interpreter.TensorHandle(left @ right.T + d.data, d.dtype.scalar)


def mend() -> None:
    """Give the interpreter these products and conversions. Calling it again changes nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "create_dot_scaled", None) is _dot_scaled:
        return
    bfloat16.patch()  # it wraps the same conversion, and must come first
    original = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target in FLOAT8:
            return interpreter.TensorHandle(to_float8(src.data, target), target)
        if source in FLOAT8 and target == tl.float32:
            return interpreter.TensorHandle(from_float8(src.data, source), target)
        return original(self, src, dst_type, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot_scaled = _dot_scaled
