"""What Triton's interpreter computes wrongly or not at all: bfloat16, FP8, block-scaled products.

Triton 3.6 keeps narrow floats as raw bits there: a cast to bfloat16 truncates, `tl.dot` multiplies
the bits, a conversion to FP8 neither carries nor saturates, and neither `tl.dot_scaled` nor inline
PTX exists. `patch` gives all of them the meaning that compiled kernels have. Kernels do arithmetic
in float32 only, so casts, products and the instructions of PTX are all there is to replace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.kernels.optional_triton import tl, triton

# by Triton's names of the types, and of the elements of a block-scaled operand
FLOAT8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
ELEMENTS = {"E4M3": "fp8e4nv", "E5M2": "fp8e5"}
# values of the codes 0..7; 8..15 are their negatives (OCP Microscaling Formats v1.0, 5.3.3)
E2M1_VALUES = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits (uint16) of the float32 values, rounded to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).bfloat16()
    return rounded.view(torch.uint16).numpy()


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float8(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Bits of float32 values, to nearest even, saturating like cvt.satfinite on the GPU."""
    target = FLOAT8[str(dtype)]
    limit = torch.finfo(target).max
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).clamp(-limit, limit).to(target).view(torch.uint8).numpy()


def from_float8(bits: np.ndarray, dtype_name: str) -> np.ndarray:
    """float32 values of FP8 bits."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(FLOAT8[dtype_name]).float().numpy()


def _values(handle: Any) -> np.ndarray:
    return from_bfloat16(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _handle(data: np.ndarray, dtype: tl.dtype) -> Any:
    return triton.runtime.interpreter.TensorHandle(data, dtype)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    target, values = dst_type.scalar, _values(src)
    if target == tl.bfloat16:
        return _handle(to_bfloat16(values), target)
    return _handle(values.astype(triton.runtime.interpreter._get_np_dtype(target)), target)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> Any:
    product = np.matmul(_values(a), _values(b), dtype=d.data.dtype) + d.data
    return _handle(product, d.dtype.scalar)


def _scaled(data: np.ndarray, scale: Any, element: str) -> np.ndarray:
    """(rows, K) float32 values of an operand's codes times the scales of its blocks along K."""
    if element == "E2M1":  # two codes a byte, the first in the low nibble
        codes = np.stack((data & 15, data >> 4), axis=-1).reshape(*data.shape[:-1], -1)
        values = np.where(codes & 8, -1, 1).astype(np.float32) * E2M1_VALUES[codes & 7]
    else:
        values = from_float8(data, ELEMENTS[element])
    if scale.dtype.scalar == tl.float8e4nv:
        factors = from_float8(scale.data, "fp8e4nv")
    else:
        exponents = torch.from_numpy(np.ascontiguousarray(scale.data))
        factors = exponents.view(torch.float8_e8m0fnu).float().numpy()
    return values * factors.repeat(values.shape[-1] // factors.shape[-1], -1)


def _dot_scaled(
    self: Any, a: Any, a_scale: Any, a_element: Any, b: Any, b_scale: Any, b_element: Any,
    fast_math: bool, a_k_pack: bool, b_k_pack: bool, d: Any,
) -> Any:  # fmt: skip
    left = _scaled(a.data, a_scale, a_element.name)
    right = _scaled(b.data.T, b_scale, b_element.name)
    return _handle(left @ right.T + d.data, d.dtype.scalar)


def _pack_bfloat16(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return to_bfloat16(low).astype(np.uint32) | to_bfloat16(high).astype(np.uint32) << 16


# PTX that kernels may hold inline: the whole text, and what it computes
PTX: dict[str, Callable[..., np.ndarray]] = {
    "rcp.approx.ftz.f32 $0, $1;": np.reciprocal,
    "cvt.rn.bf16x2.f32 $0, $2, $1;": _pack_bfloat16,
}


class _Results(NamedTuple):
    """What `create_inline_asm` returns: one result."""

    handle: Any

    def get_result(self, index: int) -> Any:
        return self.handle


def _inline_asm(
    self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
) -> _Results:
    return _Results(_handle(PTX[text](*(x.data for x in values)), types[0].scalar))


def patch() -> None:
    """Give the interpreter these casts and products. Calling it again changes nothing."""
    builder: Any = triton.runtime.interpreter.InterpreterBuilder
    if builder.create_dot is _dot:
        return
    builder.cast_impl = _cast
    builder.create_dot = _dot
    builder.create_dot_scaled = _dot_scaled
    builder.create_inline_asm = _inline_asm
    original = builder.create_fp_to_fp  # for explicit rounding modes and what is not listed here

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if {source, target} <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
            return _cast(self, src, dst_type)
        if source == tl.float32 and str(target) in FLOAT8:
            return _handle(to_float8(src.data, target), target)
        if str(source) in FLOAT8 and target == tl.float32:
            return _handle(from_float8(src.data, str(source)), target)
        return original(self, src, dst_type, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp
