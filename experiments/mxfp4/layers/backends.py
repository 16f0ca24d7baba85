"""Who quantizes and multiplies: the kernels on block-scaled tensor cores, or plain PyTorch.

    native   kernels.quantize and kernels.gemm; a GPU without such tensor cores is an error
    emulate  reference.quantize, and products of the dequantized operands in float32: the same
             elements and exact products, on any device; its time says nothing about native speed

Both make the same operands bit for bit; their products differ by the order of float32 sums.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.kernels.quantize import quantize as quantize_kernel
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer, ScaledTensor
from experiments.mxfp4.numbers.randomness import hadamard
from nanochat.settings import require_known


@dataclass(frozen=True)
class OperandSpec:
    """How one orientation of a matrix, an operand of a product, is quantized.

    signs  of the transform, as in randomness.hadamard
    """

    quantizer: Quantizer
    signs: Tensor | None = None


Pair = tuple[ScaledTensor | None, ScaledTensor | None]


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 in the dtype of x."""
    return x.relu().square()


class Native:
    """The Triton kernels.

    quantize         (Q(f(x)), Q(f(x)^T)) of a matrix; f is relu(x)^2 if `squared`; seed and stream
                     of stochastic rounding, as in kernels.quantize
    multiply         a b^T
    weight_gradient  a b^T in float32, of few rows and a long contracted axis
    """

    name = "native"

    def quantize(
        self,
        x: Tensor,
        rows: OperandSpec | None,
        columns: OperandSpec | None,
        seed: Tensor,
        stream: int,
        squared: bool = False,
    ) -> Pair:
        # One pass over x makes both orientations, unless they need other signs or tensor scales.
        if rows is not None and columns is not None and not _share_a_pass(rows, columns):
            first, _ = self.quantize(x, rows, None, seed, stream, squared)
            _, second = self.quantize(x, None, columns, seed, stream, squared)
            return first, second
        spec = columns or rows
        if spec is None:
            return None, None
        if rows is not None and rows.quantizer.hadamard:  # the one that has signs
            spec = rows
        # nvfp4 needs the largest element of the transformed matrix before anything is quantized
        scale = None
        if spec.quantizer.format == "nvfp4":
            x, squared = relu2(x) if squared else x, False
            operand = x if columns is None else x.mT
            scale = reference.tensor_scale(
                hadamard(operand, spec.signs) if spec.quantizer.hadamard else operand
            )
        return quantize_kernel(
            x,
            rows and rows.quantizer,
            columns and columns.quantizer,
            prologue="relu2" if squared else "none",
            seed=seed,
            stream=stream,
            signs=spec.signs,
            scale=scale,
        )

    def multiply(self, a: ScaledTensor, b: ScaledTensor, dtype: torch.dtype) -> Tensor:
        return gemm.matmul(a, b, dtype)

    def weight_gradient(self, a: ScaledTensor, b: ScaledTensor) -> Tensor:
        out = torch.zeros((a.shape[0], b.shape[0]), device=a.codes.device)
        gemm.matmul_add_(out, a, b)
        return out


def _share_a_pass(rows: OperandSpec, columns: OperandSpec) -> bool:
    """One launch has one tensor scale and one set of signs."""
    both = (rows, columns)
    transformed = [spec for spec in both if spec.quantizer.hadamard]
    same_signs = len(transformed) < 2 or rows.signs is columns.signs
    return same_signs and all(spec.quantizer.format != "nvfp4" for spec in both)


class Emulated:
    """The same methods in plain PyTorch."""

    name = "emulate"

    def quantize(
        self,
        x: Tensor,
        rows: OperandSpec | None,
        columns: OperandSpec | None,
        seed: Tensor,
        stream: int,
        squared: bool = False,
    ) -> Pair:
        x = relu2(x) if squared else x

        def orientation(spec: OperandSpec | None, transposed: bool) -> ScaledTensor | None:
            if spec is None:
                return None
            return reference.quantize(
                x.mT.contiguous() if transposed else x,  # strided passes are slow
                spec.quantizer,
                seed=seed,
                stream=stream,
                transposed=transposed,
                signs=spec.signs,
                # NaN passes through, as in the kernels: the training loop looks at the loss anyway
                propagate=True,
            )

        return orientation(rows, False), orientation(columns, True)

    def multiply(self, a: ScaledTensor, b: ScaledTensor, dtype: torch.dtype) -> Tensor:
        # the scale of an nvfp4 tensor comes last: without it elements fit TF32 and bfloat16
        product = _elements(a) @ _elements(b).mT
        for t in (a, b):
            product = product if t.tensor_scale is None else product * t.tensor_scale
        return product.to(dtype)

    def weight_gradient(self, a: ScaledTensor, b: ScaledTensor) -> Tensor:
        return self.multiply(a, b, torch.float32)


def _elements(t: ScaledTensor) -> Tensor:
    if t.tensor_scale is not None:
        t = replace(t, tensor_scale=torch.ones_like(t.tensor_scale))
    return reference.dequantize(t)


Backend = Native | Emulated
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Native(), Emulated())}


def find_backend(name: str) -> Backend:
    """The backend "native" or "emulate"; ValueError for another."""
    require_known("backend", name, BACKENDS)
    return BACKENDS[name]
