"""A linear layer whose products run in block-scaled formats, and the ReLU^2 network made of two.

    forward   y = Q(f(x)) Q(W)^T
    backward  d f(x) = Q(dy) Q(W^T)^T,    dW = Q(dy^T) Q(f(x)^T)^T,    f the identity or relu(x)^2

Q is straight-through: its derivative is 1. Where a recipe has no quantizer for a product, that
product runs in the dtype of x. Both orientations of x, W and dy are quantized while they are in
registers; for the backward pass only the codes of x^T and W^T are kept.

One micro-batch of 16,384 tokens through 768 -> 3,072 features with mx8f_mx4b:

    forward    x   (16384, 768)    rows in E4M3 for fprop, columns (768, 16384) in FP4 for wgrad
               W   (3072, 768)     rows in E4M3 for fprop, columns (768, 3072) in FP4 for dgrad
               y   (16384, 3072)   bfloat16
    kept       x^T 6.7 MB instead of 25.2 MB of bfloat16, W^T 1.3 MB
    backward   dy  (16384, 3072)   rows for dgrad, columns (3072, 16384) for wgrad, both in FP4
               dx  (16384, 768)    bfloat16;    dW (3072, 768) float32

Shapes  x: (..., K); W: (N, K) float32; y: (..., N). K and N, and in training the number of rows of
        x, divide into blocks.
Error   of products: that of the backend. x enters Hadamard transforms rounded to bfloat16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mxfp4.layers.backends import Backend, OperandSpec, relu2
from experiments.mxfp4.layers.quartet import QuartetLinear
from experiments.mxfp4.layers.recipes import Product, Recipe
from experiments.mxfp4.layers.step_randomness import StepRandomness
from experiments.mxfp4.numbers.formats import Quantizer, ScaledTensor

STREAMS = 3  # of a layer: x, W, dy


@dataclass(frozen=True)
class LayerSpec:
    """What a layer needs to know besides its tensors; stream is the first of its STREAMS."""

    recipe: Recipe
    backend: Backend
    stream: int
    squared: bool = False


def _operand(
    product: Product | None, operand: str, signs: Tensor | None = None
) -> OperandSpec | None:
    """How operand "a" or "b" of a product is quantized; None where the product is not."""
    if product is None:
        return None
    quantizer: Quantizer = getattr(product, operand)
    return OperandSpec(quantizer, signs if quantizer.hadamard else None)


def _flat(t: ScaledTensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if t is None else (t.codes, t.scales, t.tensor_scale)


class BlockScaledLinear(torch.autograd.Function):
    """The products of a layer as its spec says; x (M, K)."""

    @staticmethod
    def forward(ctx, x, weight, seed, signs, spec, training):
        recipe, backend = spec.recipe, spec.backend
        # x: its rows for this pass, its columns for the weight gradient
        columns = _operand(recipe.wgrad, "b", signs) if training else None
        rows = _operand(recipe.fprop, "a")
        x_rows, x_columns = backend.quantize(x, rows, columns, seed, spec.stream, spec.squared)
        # W: its rows for this pass, its columns for the gradient of x
        columns = _operand(recipe.dgrad, "b", signs) if training else None
        rows = _operand(recipe.fprop, "b")
        w_rows, w_columns = backend.quantize(weight, rows, columns, seed, spec.stream + 1)
        # x itself is kept where its gradient needs it: ReLU^2, or a wgrad that is not quantized
        if training:
            kept_x = x if x_columns is None or spec.squared else None
            kept_w = weight if w_columns is None else None
            ctx.save_for_backward(kept_x, *_flat(x_columns), kept_w, *_flat(w_columns), seed, signs)
            ctx.spec, ctx.rows, ctx.columns = spec, x.shape[0], weight.shape[0]
        if x_rows is None or w_rows is None:
            return F.linear(relu2(x) if spec.squared else x, weight.to(x.dtype))
        return backend.multiply(x_rows, w_rows, x.dtype)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *x_columns, weight, w_codes, w_scales, w_total, seed, signs = ctx.saved_tensors
        recipe, backend, stream = ctx.spec.recipe, ctx.spec.backend, ctx.spec.stream + 2
        rows, columns = _operand(recipe.dgrad, "a", signs), _operand(recipe.wgrad, "a", signs)
        # dy: its rows for the gradient of x, its columns for that of W
        dy_rows, dy_columns = backend.quantize(dy, rows, columns, seed, stream)
        if recipe.dgrad is None:
            dx = dy @ weight.to(dy.dtype)
        else:
            w = ScaledTensor(w_codes, w_scales, recipe.dgrad.format, ctx.columns, w_total)
            dx = backend.multiply(dy_rows, w, dy.dtype)
        if ctx.spec.squared:  # through relu(x)^2
            dx = dx * (2 * x.relu())
        if recipe.wgrad is None:
            dw = (dy.mT @ (relu2(x) if ctx.spec.squared else x)).float()
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
        self.specs = {s: LayerSpec(recipe, backend, stream, s) for s in (False, True)}

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
        function = QuartetLinear if self.recipe.quest else BlockScaledLinear
        if self.recipe.quest and squared:
            x_MK, squared = relu2(x_MK), False
        random = self.randomness
        y = function.apply(
            x_MK, self.weight, random.seed, random.signs, self.specs[squared], training
        )
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, recipe={self.recipe.name}"


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
