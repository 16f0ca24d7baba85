"""Matrices, operands and a layer that several tests use."""

from typing import Any

import torch
from torch import Tensor, nn

from experiments.mxfp4.layers.backends import BACKENDS
from experiments.mxfp4.layers.linear import MXLinear
from experiments.mxfp4.layers.recipes import Recipe
from experiments.mxfp4.layers.step_randomness import StepRandomness
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer, ScaledTensor

BLOCK_SCALED = ((10, 0), (12, 0))  # capabilities whose tensor cores multiply blocks


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


STREAM = 7


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """Multiples of 1/16 below 8 in 7 bits, rows of magnitudes 2^-8 to 2^8: sums of 32 are exact."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, columns), generator=generator) / 16
    powers = torch.randint(-8, 9, (rows, 1), generator=generator)
    return (x * torch.exp2(powers.float())).to(dtype).to(DEVICE)


def operand(rows: int, columns: int, q: Quantizer, seed: int) -> ScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(DEVICE)
    return reference.quantize(x, q)


def assert_same(got: ScaledTensor | None, want: ScaledTensor) -> None:
    assert got is not None
    assert (got.format, got.shape) == (want.format, want.shape)
    assert torch.equal(got.scales, want.scales)  # the padding too
    assert torch.equal(got.codes, want.codes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(
        torch.randn(shape, generator=generator)
    )


X, W, DY = normal(64, 96), normal(32, 96, seed=1), normal(64, 32, seed=2)


def randomness(recipe: Recipe) -> StepRandomness:
    drawn = StepRandomness("cpu", seed=3, signs=recipe.signs)
    drawn.begin_step(5)
    return drawn


def run_layer(
    recipe: Recipe, backend: str = "emulate", squared: bool = False
) -> tuple[Tensor, ...]:
    """y, dx, dW of a layer."""
    x, w = X.clone().requires_grad_(), nn.Parameter(W.clone())
    layer = MXLinear(w, recipe, BACKENDS[backend], randomness(recipe), STREAM)
    y = layer(x.view(2, 32, 96), squared=squared)
    assert y.shape == (2, 32, 32)
    y.backward(DY.view(2, 32, 32))
    assert x.grad is not None
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    return y.detach().flatten(0, 1), x.grad, w.grad
