"""Quantized layers against float64 products of the oracle's operands."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.mxfp4.layers.backends import BACKENDS
from experiments.mxfp4.layers.convert import (
    MicroBatches,
)
from experiments.mxfp4.layers.linear import MXMLP, MXLinear
from experiments.mxfp4.layers.recipes import RECIPES, Product, Recipe
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer
from experiments.mxfp4.tests.support import DY, STREAM, W, X, normal, randomness, run_layer
from nanochat.gpt import Linear


def slow(recipe: Recipe, squared: bool = False) -> tuple[Tensor, ...]:
    """The same in float64, every operand quantized on its own."""
    drawn = randomness(recipe)
    a = X.relu().square() if squared else X

    def operand(x: Tensor, q: Quantizer, stream: int, columns: bool, forward: bool) -> Tensor:
        signs = None if forward else drawn.signs
        x = x.mT.contiguous() if columns else x
        t = reference.quantize(
            x, q, seed=int(drawn.seed), stream=STREAM + stream, transposed=columns, signs=signs
        )
        return reference.dequantize(t, torch.float64)

    y, dx, dw = a.double() @ W.mT.double(), DY.double() @ W.double(), DY.mT.double() @ a.double()
    if (p := recipe.fprop) is not None:
        y = operand(a, p.a, 0, False, True) @ operand(W, p.b, 1, False, True).mT
    if (p := recipe.dgrad) is not None:
        dx = operand(DY, p.a, 2, False, False) @ operand(W, p.b, 1, True, False).mT
    if (p := recipe.wgrad) is not None:
        dw = operand(DY, p.a, 2, True, False) @ operand(a, p.b, 0, True, False).mT
    return y, dx * (2 * X.relu() if squared else 1), dw


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.quest])
def test_products_of_every_recipe(name: str, squared: bool) -> None:
    recipe = RECIPES[name]
    for got, want in zip(run_layer(recipe, squared=squared), slow(recipe, squared), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("product", ["fprop", "dgrad", "wgrad"])
def test_each_product_switches_alone(product: str) -> None:
    fp4: dict[str, Any] = {product: Product.of("mxfp4 even")}
    plain, quantized = run_layer(Recipe("plain")), run_layer(Recipe("one", **fp4))
    changed = [not torch.equal(a, b) for a, b in zip(plain, quantized, strict=True)]
    assert changed == [product == name for name in ("fprop", "dgrad", "wgrad")]


def test_without_quantizers_it_is_the_plain_layer() -> None:
    for squared in (False, True):
        x, layer = X.clone().requires_grad_(), Linear(96, 32)
        with torch.no_grad():
            layer.weight.copy_(W)
        y = layer(x.relu().square() if squared else x)
        y.backward(DY)
        assert x.grad is not None
        assert layer.weight.grad is not None
        for got, want in zip(
            run_layer(Recipe("plain"), squared=squared), (y, x.grad, layer.weight.grad), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mx8f_mx4b", "mxfp4_rht_sr", "quartet_even", "nvfp4_sr"])
def test_kernels_give_what_the_emulation_gives(name: str) -> None:
    """One pass over x, or two where signs or tensor scales differ; run by the interpreter."""
    recipe = RECIPES[name]
    for got, want in zip(
        run_layer(recipe, "native", squared=True), run_layer(recipe, squared=True), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


def test_bfloat16_activations() -> None:
    recipe = RECIPES["mx8f_mx4b"]
    x, w = X.bfloat16().requires_grad_(), nn.Parameter(W.clone())
    y = MXLinear(w, recipe, BACKENDS["emulate"], randomness(recipe))(x)
    y.backward(DY.bfloat16())
    assert x.grad is not None
    assert w.grad is not None
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want = slow(recipe)[0]
    torch.testing.assert_close(y.double(), want, rtol=0, atol=0.02 * float(want.abs().max()))


def test_stochastic_gradients_are_unbiased() -> None:
    """The mean over many steps comes near to the gradient, 1 / sqrt(steps) times as far as one."""
    recipe = RECIPES["mxfp4_rht_sr"]
    exact = slow(Recipe("plain"))[1:]
    layer = MXLinear(nn.Parameter(W.clone()), recipe, BACKENDS["emulate"], randomness(recipe))
    sums, errors, steps = [torch.zeros_like(X), torch.zeros_like(W)], [0.0, 0.0], 64
    for step in range(steps):
        layer.randomness.begin_step(step)
        x = X.clone().requires_grad_()
        layer.weight.grad = None
        layer(x).backward(DY)
        for i, gradient in enumerate((x.grad, layer.weight.grad)):
            assert gradient is not None
            sums[i] += gradient / steps
            errors[i] += float((gradient - exact[i]).square().mean()) / steps
    for mean, want, error in zip(sums, exact, errors, strict=True):
        assert float((mean - want).square().mean()) < 1.5 * error / steps


def test_what_waits_for_the_backward_pass_is_small() -> None:
    """Of x only its transposed codes: 4.25 bits an element."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    recipe = RECIPES["mx8f_mx4b"]
    x, w = normal(128, 128).requires_grad_(), nn.Parameter(normal(128, 128))
    layer = MXLinear(w, recipe, BACKENDS["emulate"], randomness(recipe))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(t.nbytes for t in saved) == 2 * 128 * 128 * 4.25 / 8 + 16  # x^T, W^T, seed and signs


@pytest.mark.long
def test_compiled_gradients_are_the_same() -> None:
    """The kernels through torch.compile's tracing: no graph break; micro-batches round apart."""
    recipe = RECIPES["mxfp4_rht_sr"]
    gradients = []
    for compiled in (False, True):
        drawn = randomness(recipe)
        weights = [nn.Parameter(normal(64, 32)), nn.Parameter(normal(32, 64))]
        layers = [MXLinear(w, recipe, BACKENDS["native"], drawn, STREAM) for w in weights]
        network = MXMLP(*layers)
        network.register_forward_pre_hook(MicroBatches(drawn))
        runner: Any = network
        if compiled:
            runner = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
        for _ in range(2):
            runner(X[:32, :32]).square().sum().backward()
        gradients.append([w.grad for w in weights])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
