"""A linear layer as the Quartet paper has it: what `quartet_even` is compared with.

    X_q, M_x = QuEST(X H);  W_q, M_w = QuEST(W H);  y = X_q W_q^T
    dx = (Q(dy) Q(W_q^T)^T * M_x) H^T;  dW = (Q(dy^T) Q(X_q^T)^T * M_w) H^T,  Q of the recipe

QuEST takes the scale of a block of 32 from its standard deviation, 2^floor(log2(0.487 std + 1e-8)),
saturates what is larger, and M drops the gradient of exactly those elements. There is no kernel for
it: the even scale of the largest magnitude has about half of its squared error on Gaussian blocks.

Source  R. Castro et al., Quartet, arXiv:2505.14669, algorithm 1; constants from its code,
        github.com/IST-DASLab/Quartet.
"""

from typing import Any

import torch
from torch import Tensor

from experiments.mxfp4.layers.backends import OperandSpec
from experiments.mxfp4.numbers.formats import E2M1_MAX
from experiments.mxfp4.numbers.randomness import HADAMARD, hadamard, hadamard_matrix
from experiments.mxfp4.numbers.reference import decode_e2m1, encode_e2m1

GAUSSIAN_SCALE = 2.92247856 / E2M1_MAX  # of least squared error for Gaussian elements
SMALLEST = 1e-8


def quest_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized values of hadamard(x), float32, and the mask of those that were not clipped."""
    blocks = hadamard(x).unflatten(-1, (-1, HADAMARD))
    std = blocks.var(dim=-1, correction=0, keepdim=True).sqrt()
    scale = torch.exp2(torch.log2(GAUSSIAN_SCALE * std + SMALLEST).floor())
    y = blocks / scale
    values = decode_e2m1(encode_e2m1(y)) * scale
    return values.flatten(-2), (y.abs() < E2M1_MAX).flatten(-2)


def inverse_hadamard(x: Tensor) -> Tensor:
    """The inverse of hadamard without signs: x of float32, not rounded."""
    blocks = x.unflatten(-1, (-1, HADAMARD))
    return (blocks @ hadamard_matrix(x.device) * HADAMARD**-0.5).flatten(-2)


class QuartetLinear(torch.autograd.Function):
    """x (M, K), weight (N, K); the other arguments as BlockScaledLinear's."""

    @staticmethod
    def forward(ctx, x, weight, seed, signs, spec, training):
        x_values, x_mask = quest_quantize(x)
        w_values, w_mask = quest_quantize(weight)
        if training:
            ctx.save_for_backward(x_values, x_mask, w_values, w_mask, seed, signs)
            ctx.spec = spec
        return (x_values @ w_values.mT).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_values, x_mask, w_values, w_mask, seed, signs = ctx.saved_tensors
        recipe, backend, stream = ctx.spec.recipe, ctx.spec.backend, ctx.spec.stream

        # The operands are those of the forward pass: already quantized, and transformed.
        def quantized(x: Tensor, rows: Any, columns: Any, operand: int) -> Any:
            specs = (q and OperandSpec(q, signs) for q in (rows, columns))
            return backend.quantize(x, *specs, seed, stream + operand)

        _, x_columns = quantized(x_values, None, recipe.wgrad.b, 0)
        _, w_columns = quantized(w_values, None, recipe.dgrad.b, 1)
        dy_rows, dy_columns = quantized(dy, recipe.dgrad.a, recipe.wgrad.a, 2)
        dx = backend.multiply(dy_rows, w_columns, torch.float32)
        dw = backend.weight_gradient(dy_columns, x_columns)
        # straight-through only where nothing was clipped, then back out of the transform
        dx, dw = inverse_hadamard(dx * x_mask), inverse_hadamard(dw * w_mask)
        return dx.to(dy.dtype), dw, None, None, None, None
