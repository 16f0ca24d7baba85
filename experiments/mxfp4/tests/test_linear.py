"""Quantized layers against float64 products of the oracle's operands; conversion of a model."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mxfp4 import reference
from experiments.mxfp4.backends import BACKENDS
from experiments.mxfp4.convert import MicroBatches, convert, linear_layers, require_native_products
from experiments.mxfp4.formats import Quantizer
from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.linear import MXMLP, MXLinear
from experiments.mxfp4.quest import inverse_hadamard, quest
from experiments.mxfp4.randomness import hadamard
from experiments.mxfp4.recipes import RECIPES, Product, Recipe, find_recipe
from experiments.mxfp4.step_randomness import FIXED_SIGNS, StepRandomness
from nanochat.gpt import GPT, MLP, GPTConfig, Linear

STREAM = 7
CONFIG = GPTConfig(sequence_len=32, vocab_size=70, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)


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


def run(recipe: Recipe, backend: str = "emulate", squared: bool = False) -> tuple[Tensor, ...]:
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
    for got, want in zip(run(recipe, squared=squared), slow(recipe, squared), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("product", ["fprop", "dgrad", "wgrad"])
def test_each_product_switches_alone(product: str) -> None:
    fp4: dict[str, Any] = {product: Product.of("mxfp4 even")}
    plain, quantized = run(Recipe("plain")), run(Recipe("one", **fp4))
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
            run(Recipe("plain"), squared=squared), (y, x.grad, layer.weight.grad), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mx8f_mx4b", "mxfp4_rht_sr", "quartet_even", "nvfp4_sr"])
def test_kernels_give_what_the_emulation_gives(name: str) -> None:
    """One pass over x, or two where signs or tensor scales differ; run by the interpreter."""
    recipe = RECIPES[name]
    for got, want in zip(
        run(recipe, "native", squared=True), run(recipe, squared=True), strict=True
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


def test_quest_drops_the_gradients_of_clipped_elements() -> None:
    """Eight bits in the backward pass come near to the gradients that masks and transforms give."""
    eight = Product.of("mxfp8_e4m3")
    recipe = replace(find_recipe("quartet"), dgrad=eight, wgrad=eight, signs="fixed")
    (xq, x_mask), (wq, w_mask) = quest(X), quest(W)
    assert not x_mask.all(), "heavy tails are clipped"
    y, dx, dw = run(recipe)
    torch.testing.assert_close(y, xq @ wq.mT)
    exact_dx = inverse_hadamard((DY @ wq) * x_mask)
    exact_dw = inverse_hadamard((DY.mT @ xq) * w_mask)
    for got, want in ((dx, exact_dx), (dw, exact_dw)):
        assert float((got - want).square().mean() / want.square().mean()) < 4e-3


def test_quest_rounds_its_gradients_as_the_recipe_says() -> None:
    first, again = run(find_recipe("quartet")), run(find_recipe("quartet"))
    fixed = run(replace(find_recipe("quartet"), signs="fixed"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [torch.equal(a, b) for a, b in zip(first, fixed, strict=True)] == [True, False, False]


def test_quest_scale_is_of_the_standard_deviation() -> None:
    values, mask = quest(X)
    blocks = hadamard(X).unflatten(-1, (-1, 32)).flatten(0, 1)
    for i, block in enumerate(blocks.double()):
        std = float((block - block.mean()).square().mean().sqrt())
        scale = 2.0 ** math.floor(math.log2(2.92247856 / 6 * std))
        nearest = min_distance = block.new_full((32,), math.inf)
        for element in (
            -6.0,
            -4.0,
            -3.0,
            -2.0,
            -1.5,
            -1.0,
            -0.5,
            0.0,
            0.5,
            1.0,
            1.5,
            2.0,
            3.0,
            4.0,
            6.0,
        ):
            distance = (block - element * scale).abs()
            nearest = torch.where(distance < min_distance, element * scale, nearest)
            min_distance = torch.minimum(distance, min_distance)
        assert torch.equal(values.unflatten(-1, (-1, 32)).flatten(0, 1)[i].double(), nearest)
        assert torch.equal(mask.unflatten(-1, (-1, 32)).flatten(0, 1)[i], block.abs() < 6 * scale)


def model(config: GPTConfig = CONFIG) -> GPT:
    built = GPT(config)
    built.init_weights(0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return built


IDS = torch.randint(70, (2, 32), generator=torch.Generator().manual_seed(4))


def test_conversion_keeps_parameters_and_their_names() -> None:
    built = model()
    before = dict(built.named_parameters())
    conversion = convert(built, RECIPES["mxfp4_rtn"], backend="emulate")
    after = dict(built.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(isinstance(layer, MXLinear) for layer in linear_layers(built).values())
    streams = [layer.plans[False].stream for layer in linear_layers(built).values()]  # pyright: ignore
    assert len(set(streams)) == 8
    assert conversion.instructions == {}
    assert type(built.lm_head) is Linear


def test_converted_without_quantizers_is_the_plain_model() -> None:
    built = model()
    want = built(IDS)
    convert(built, Recipe("plain"), backend="emulate")
    torch.testing.assert_close(built(IDS), want)


def test_kept_layers_stay() -> None:
    built = model()
    convert(built, RECIPES["mxfp4_rtn"], ("blocks.0", "blocks.*.mlp.c_proj"), "emulate")
    kept = [name for name, layer in linear_layers(built).items() if type(layer) is Linear]
    assert kept == [
        "blocks.0.attn.c_qkv",
        "blocks.0.attn.c_proj",
        "blocks.0.mlp.c_fc",
        "blocks.0.mlp.c_proj",
        "blocks.1.mlp.c_proj",
    ]
    assert type(built.blocks[0].mlp) is MLP, "it goes on as one operation"
    mlp = built.blocks[1].mlp
    assert isinstance(mlp, MXMLP)
    x = X[:32, :64]
    want = F.linear(mlp.c_fc(x).relu().square(), mlp.c_proj.weight)  # pyright: ignore
    assert torch.equal(mlp(x), want)


@pytest.mark.parametrize(
    ("keep", "part"),
    [
        (("blocks.7",), "no layer is called 'blocks.7'; did you mean 'blocks.1'"),
        (("blocks.0.mlp.c_fx",), "did you mean 'blocks.0.mlp.c_fc'"),
        (("wte",), "no layer is called 'wte'"),
    ],
)
def test_a_kept_layer_that_is_not_there(keep: tuple[str, ...], part: str) -> None:
    built = model()
    with pytest.raises(ValueError, match=part):
        convert(built, RECIPES["mxfp4_rtn"], keep, "emulate")
    assert not any(isinstance(layer, MXLinear) for layer in linear_layers(built).values())


def test_features_that_do_not_divide() -> None:
    odd = GPTConfig(sequence_len=32, vocab_size=70, n_layer=1, n_head=2, n_kv_head=2, n_embd=48)
    with pytest.raises(ValueError, match=r"blocks\.0\.\S+ has 48 input features.*blocks of 32"):
        convert(model(odd), RECIPES["mxfp4_rtn"], backend="emulate")


def test_tokens_that_do_not_divide() -> None:
    built = model()
    convert(built, RECIPES["mxfp4_rtn"], backend="emulate")
    with pytest.raises(ValueError, match=r"30 tokens of a micro-batch .* blocks of 32"):
        built(IDS[:1, :30], IDS[:1, :30])
    with torch.no_grad():
        built(IDS[:1, :30], IDS[:1, :30])  # evaluation has no weight gradient


def test_a_model_is_converted_once() -> None:
    built = model()
    convert(built, RECIPES["mxfp4_rtn"], backend="emulate")
    with pytest.raises(ValueError, match="build it anew"):
        convert(built, RECIPES["mxfp4_rtn"], backend="emulate")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend 'fast' is unknown; choose one of native, emul"):
        convert(model(), RECIPES["mxfp4_rtn"], backend="fast")


def test_native_on_a_cpu_is_an_error() -> None:
    built = model()
    with pytest.raises(NotNativeError, match=r"on cpu.*--mx_backend=emulate"):
        convert(built, RECIPES["mx8f_mx4b"])
    assert not any(isinstance(layer, MXLinear) for layer in linear_layers(built).values())


def test_quest_has_no_kernels_anywhere() -> None:
    with pytest.raises(NotNativeError, match="quartet has no kernels"):
        require_native_products(RECIPES["quartet"], torch.device("cuda"))


def test_random_numbers_of_a_step_are_a_function_of_step_micro_batch_and_rank() -> None:
    seen = {}
    for rank in (0, 1):
        drawn = StepRandomness("cpu", seed=42, rank=rank, signs="random")
        for step in (0, 1, 2**20):
            drawn.begin_step(step)
            for micro_batch in range(3):
                assert drawn.signs is not None
                seen[int(drawn.seed)] = (rank, step, micro_batch)
                drawn.begin_micro_batch()
    assert len(seen) == 18
    assert min(seen) >= 0
    ranks = [StepRandomness("cpu", 42, rank, "random") for rank in (0, 1)]
    signs = [int(drawn.signs) for drawn in ranks if drawn.signs is not None]
    assert signs[0] == signs[1], "gradients of all ranks are summed"


def test_signs_of_a_policy() -> None:
    def drawn(signs: str) -> list[int | None]:
        source, found = StepRandomness("cpu", 1, signs=signs), []
        for step in (0, 1, 0):
            source.begin_step(step)
            found.append(None if source.signs is None else int(source.signs))
        return found

    assert drawn("none") == [None] * 3
    assert drawn("fixed") == [FIXED_SIGNS] * 3
    first, second, again = drawn("random")
    assert first == again != second


def test_fixed_signs_keep_a_mean_shared_by_tokens_from_costing_precision() -> None:
    """Attention outputs of neighbouring tokens have one: without signs one coefficient takes it."""
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) + 2.0
    quantizer, errors = Quantizer(hadamard=True), []
    for signs in (None, torch.tensor(FIXED_SIGNS)):
        t = reference.quantize(x.mT, quantizer, signs=signs)
        v = hadamard(x.mT, signs)
        errors.append(float((reference.dequantize(t) - v).square().sum() / v.square().sum()))
    assert errors[0] > 1.2 * errors[1]


def test_each_micro_batch_rounds_anew_and_evaluation_does_not_count() -> None:
    built = model()
    conversion = convert(built, RECIPES["mxfp4_rht_sr"], backend="emulate")

    def gradient() -> Tensor:
        built.zero_grad()
        built(IDS, IDS).backward()
        grad = built.blocks[0].attn.c_qkv.weight.grad  # pyright: ignore
        assert isinstance(grad, Tensor)
        return grad.clone()

    conversion.begin_step(3)
    first, second = gradient(), gradient()
    conversion.begin_step(3)
    with torch.no_grad():
        built(IDS, IDS)
    assert torch.equal(gradient(), first)
    assert not torch.equal(first, second)


def test_a_gradient_of_another_micro_batch_is_an_error() -> None:
    """Two forward passes, then the backward pass of the first: its random numbers are gone."""
    built = model()
    convert(built, RECIPES["mxfp4_rht_sr"], backend="emulate")
    loss = built(IDS, IDS)
    built(IDS, IDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


def test_compiled_gradients_are_the_same() -> None:
    """The kernels through torch.compile's tracing: no graph break, each micro-batch rounds anew."""
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
