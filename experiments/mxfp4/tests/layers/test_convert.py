"""Conversion of a model: what is replaced, what stays, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.layers.convert import (
    convert,
    linear_layers,
    require_native_products,
)
from experiments.mxfp4.layers.linear import MXMLP, MXLinear
from experiments.mxfp4.layers.recipes import RECIPES, Recipe
from experiments.mxfp4.tests.support import X
from nanochat.gpt import GPT, MLP, GPTConfig, Linear

CONFIG = GPTConfig(sequence_len=32, vocab_size=70, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)


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
    streams = [layer.specs[False].stream for layer in linear_layers(built).values()]  # pyright: ignore
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
    assert type(built.blocks[0].mlp) is MLP, "it stays one operation"
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
    with pytest.raises(ValueError, match="build a new one"):
        convert(built, RECIPES["mxfp4_rtn"], backend="emulate")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend 'fast' is unknown; choose native or emulate"):
        convert(model(), RECIPES["mxfp4_rtn"], backend="fast")


def test_native_on_a_cpu_is_an_error() -> None:
    built = model()
    with pytest.raises(NotNativeError, match=r"on cpu.*--mx_backend=emulate"):
        convert(built, RECIPES["mx8f_mx4b"])
    assert not any(isinstance(layer, MXLinear) for layer in linear_layers(built).values())


def test_quest_has_no_kernels_anywhere() -> None:
    with pytest.raises(NotNativeError, match="quartet has no kernels"):
        require_native_products(RECIPES["quartet"], torch.device("cuda"))


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
