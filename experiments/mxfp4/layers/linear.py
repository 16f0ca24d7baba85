"""A linear layer whose products run in block-scaled formats, and the ReLU^2 network made of two.

    forward   y = Q(f(x)) Q(W)^T
    backward  d f(x) = Q(dy) Q(W^T)^T,    dW = Q(dy^T) Q(f(x)^T)^T,    f the identity or relu(x)^2

Q is straight-through: its derivative is 1. Where a recipe has no quantizer for a product, that
product runs in the dtype of x. Both orientations of x, W and dy are quantized when they are at
hand: of x only the codes of the transposed one wait for the backward pass.

Shapes  x: (..., K); W: (N, K) float32; y: (..., N). K and N, and in training the number of rows of
        x, divide into blocks.
Error   of products: that of the backend. x enters Hadamard transforms rounded to bfloat16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mxfp4.layers.backends import Backend, Side, relu2
from experiments.mxfp4.layers.quartet import QuestLinear
from experiments.mxfp4.layers.recipes import Product, Recipe
from experiments.mxfp4.layers.step_randomness import StepRandomness
from experiments.mxfp4.numbers.formats import Quantizer, ScaledTensor

STREAMS = 3  # of a layer: x, W, dy


@dataclass(frozen=True)
class Plan:
    """What a layer needs to know besides its tensors; stream is the first of its STREAMS."""

    recipe: Recipe
    backend: Backend
    stream: int
    squared: bool = False


def _side(product: Product | None, operand: str, signs: Tensor | None = None) -> Side | None:
    """Of operand "a" or "b" of a product."""
    if product is None:
        return None
    quantizer: Quantizer = getattr(product, operand)
    return Side(quantizer, signs if quantizer.hadamard else None)


def _flat(t: ScaledTensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if t is None else (t.codes, t.scales, t.tensor_scale)


class BlockScaledLinear(torch.autograd.Function):
    """The products of a layer as its plan says; x (M, K)."""

    @staticmethod
    def forward(ctx, x, weight, seed, signs, plan, training):
        recipe, backend = plan.recipe, plan.backend
        columns = _side(recipe.wgrad, "b", signs) if training else None
        rows = _side(recipe.fprop, "a")
        x_rows, x_columns = backend.quantize(x, rows, columns, seed, plan.stream, plan.squared)
        columns = _side(recipe.dgrad, "b", signs) if training else None
        rows = _side(recipe.fprop, "b")
        w_rows, w_columns = backend.quantize(weight, rows, columns, seed, plan.stream + 1)
        if training:
            kept_x = x if x_columns is None or plan.squared else None
            kept_w = weight if w_columns is None else None
            ctx.save_for_backward(kept_x, *_flat(x_columns), kept_w, *_flat(w_columns), seed, signs)
            ctx.plan, ctx.rows, ctx.columns = plan, x.shape[0], weight.shape[0]
        if x_rows is None or w_rows is None:
            return F.linear(relu2(x) if plan.squared else x, weight.to(x.dtype))
        return backend.multiply(x_rows, w_rows, x.dtype)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *x_columns, weight, w_codes, w_scales, w_total, seed, signs = ctx.saved_tensors
        recipe, backend, stream = ctx.plan.recipe, ctx.plan.backend, ctx.plan.stream + 2
        rows, columns = _side(recipe.dgrad, "a", signs), _side(recipe.wgrad, "a", signs)
        dy_rows, dy_columns = backend.quantize(dy, rows, columns, seed, stream)
        if recipe.dgrad is None:
            dx = dy @ weight.to(dy.dtype)
        else:
            w = ScaledTensor(w_codes, w_scales, recipe.dgrad.format, ctx.columns, w_total)
            dx = backend.multiply(dy_rows, w, dy.dtype)
        if ctx.plan.squared:
            dx = dx * (2 * x.relu())
        if recipe.wgrad is None:
            dw = (dy.mT @ (relu2(x) if ctx.plan.squared else x)).float()
        else:
            codes, scales, total = x_columns
            xt = ScaledTensor(codes, scales, recipe.wgrad.format, ctx.rows, total)
            dw = backend.weight_gradient(dy_columns, xt)
        return dx, dw, None, None, None, None


class MXLinear(nn.Module):
    """y = f(x) W^T as a recipe says, in place of a Linear, whose parameter it takes over.

    stream  first of the STREAMS random streams of this layer; no other layer has it
    """

    def __init__(
        self,
        weight: nn.Parameter,
        recipe: Recipe,
        backend: Backend,
        randomness: StepRandomness,
        stream: int = 0,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.recipe = recipe
        self.randomness = randomness
        self.plans = {s: Plan(recipe, backend, stream, s) for s in (False, True)}

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor, squared: bool = False) -> Tensor:
        """squared  multiply relu(x)^2 instead of x: ReLU^2 and the quantizer are one kernel.

        Raises  ValueError in training for rows of x that do not divide into blocks.
        """
        x_MK = x.reshape(-1, x.shape[-1])
        training = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        wgrad = self.recipe.wgrad
        if training and wgrad is not None and x_MK.shape[0] % wgrad.block:
            raise ValueError(
                f"{x_MK.shape[0]} tokens of a micro-batch do not divide into blocks of "
                f"{wgrad.block}, along which the weight gradient is quantized; choose another "
                "--device_batch_size or --max_seq_len"
            )
        function = QuestLinear if self.recipe.quest else BlockScaledLinear
        if self.recipe.quest and squared:
            x_MK, squared = relu2(x_MK), False
        random = self.randomness
        y = function.apply(
            x_MK, self.weight, random.seed, random.signs, self.plans[squared], training
        )
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, recipe={self.recipe.name}"


class MXMLP(nn.Module):
    """C -> 4 C -> C with ReLU^2 between; each layer an MXLinear or a kept Linear."""

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.c_fc = c_fc
        self.c_proj = c_proj

    def forward(self, x_BTC: Tensor) -> Tensor:
        pre = self.c_fc(x_BTC)
        if isinstance(self.c_proj, MXLinear):
            return self.c_proj(pre, squared=True)
        return self.c_proj(relu2(pre))
