"""Weights of 4.25 bits: a checkpoint is quantized, loaded, and talked to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.mxfp4.layers.convert import linear_layers
from experiments.mxfp4.layers.quantized import QuantizedLinear, accept_quantized, quantized_state
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer
from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingSettings
from nanochat.text.tokenizer import get_tokenizer
from nanochat.train import precision, run
from tests.support.runs import TINY, make_base_dir, run_here

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_dir(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A run with products in mxfp4."""
    command = f"python -m scripts.base_train --num_iterations={STEPS} --model_tag=whole"
    precise = ("--precision=mxfp4", "--mx_backend=emulate")
    run_here(base, command, *TINY, f"--data_dir={base / 'text'}", *precise)
    return base / "base_checkpoints" / "whole"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / f"{STEPS:06d}" / "model.pt", weights_only=True)


def runtime(base: Path) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, 0, 0, 1, 42, base)


@pytest.mark.long
def test_a_checkpoint_trained_in_mxfp4_is_an_ordinary_one(base: Path, whole: Path) -> None:
    tokenizer = get_tokenizer(str(base / "tokenizer"))
    model, meta, _ = run.load_pretrained(str(whole), "base", runtime(base), tokenizer)
    assert meta["precision"]["recipe"] == "mx8f_mx4b"
    assert type(model) is GPT
    assert [name for name, w in model.state_dict().items() if w.dtype != torch.float32] == []


@pytest.fixture(scope="module")
def quantized(base: Path, whole: Path) -> str:
    command = "python -m experiments.mxfp4.quantize_checkpoint"
    return run_here(base, command, f"--checkpoint={whole}", "--keep=blocks.0.attn")


def test_a_quantized_checkpoint_has_four_and_a_quarter_bits(
    base: Path, whole: Path, quantized: str
) -> None:
    folder = base / "mxfp4" / "base_checkpoints" / "whole" / f"{STEPS:06d}"
    assert str(folder) in quantized
    state = torch.load(folder / "model.pt", weights_only=True)
    original = weights(whole)
    stored = sum(state[n].nbytes for n in state if n.endswith(("codes", "scales")))
    names = [n for n in original if n.startswith("blocks") and not n.startswith("blocks.0.attn")]
    assert stored == sum(original[n].numel() for n in names) * 4.25 / 8
    assert state["blocks.0.attn.c_qkv.weight"].dtype == torch.bfloat16
    assert not (base / "base_checkpoints" / "latest.pt").resolve().is_relative_to(base / "mxfp4")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta[precision.QUANTIZED]["keep"] == ["blocks.0.attn"]
    assert 0.010 < meta[precision.QUANTIZED]["relative_error"] < 0.016


def test_the_engine_computes_with_the_dequantized_weights(base: Path, quantized: str) -> None:
    tokenizer = get_tokenizer(str(base / "tokenizer"))
    checkpoint = str(base / "mxfp4" / "base_checkpoints" / "latest.pt")
    model, _, _ = run.load_pretrained(checkpoint, "base", runtime(base), tokenizer)
    plain, _, _ = run.load_pretrained("whole", "base", runtime(base), tokenizer)
    layers = linear_layers(plain)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 6
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in layers and not layer.startswith("blocks.0.attn"):
                t = reference.quantize(parameter, Quantizer("mxfp4", "even"))
                parameter.copy_(reference.dequantize(t))
            else:
                parameter.copy_(parameter.bfloat16())
    ids = torch.arange(24)[None] % 200
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids))
    engine = Engine(model, tokenizer, num_slots=2)
    assert engine.model is model, "a copy would be a plain model"
    greedy = SamplingSettings(temperature=0.0)
    (handle,) = engine.complete([Request(list(range(5)), 8, greedy)])
    (wanted,) = Engine(plain, tokenizer).complete([Request(list(range(5)), 8, greedy)])
    assert handle.tokens == wanted.tokens


def test_in_bfloat16_the_engine_makes_no_copy_either(base: Path, quantized: str) -> None:
    """What is not quantized must have the dtype of use; a copy would be a plain model."""
    tokenizer = get_tokenizer(str(base / "tokenizer"))
    half = replace(runtime(base), dtype=torch.bfloat16)
    checkpoint = str(base / "mxfp4" / "base_checkpoints" / "latest.pt")
    model, _, _ = run.load_pretrained(checkpoint, "base", half, tokenizer)
    assert model.cos.dtype == run.build_model(model.config, half, 0).cos.dtype
    engine = Engine(model, tokenizer)
    assert engine.model is model
    (handle,) = engine.complete([Request([1, 2, 3], 4, SamplingSettings(temperature=0.0))])
    assert len(handle.tokens) == 4


def test_chat_with_a_quantized_checkpoint(base: Path, quantized: str) -> None:
    command = "python -m scripts.chat_cli -p hello --max_tokens=3 --device=cpu"
    said = run_here(base, command, "--checkpoint=mxfp4/base_checkpoints/latest.pt")
    assert "weights of 6 layers in mxfp4, 4.25 bits each" in said


def test_quantizing_twice_is_an_error(base: Path, quantized: str) -> None:
    command = "python -m experiments.mxfp4.quantize_checkpoint"
    with pytest.raises(SystemExit, match="quantized already"):
        run_here(base, command, "--checkpoint=mxfp4/base_checkpoints/latest.pt")
    with pytest.raises(SystemExit, match="--scale_mode=odd must be floor, rceil or even"):
        run_here(base, command, "--scale_mode=odd")


def test_quantized_weights_do_not_train(base: Path, whole: Path) -> None:
    tokenizer = get_tokenizer(str(base / "tokenizer"))
    model, _, _ = run.load_pretrained(str(whole), "base", runtime(base), tokenizer)
    state = quantized_state(model, [])
    accept_quantized(model, {"keep": [], "bits": 4.25})
    model.load_state_dict(state)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        model(ids)
    with pytest.raises(ValueError, match="for inference: train the checkpoint they were made of"):
        model(ids, ids)


def test_a_precision_of_another_checkout(base: Path) -> None:
    model = run.build_model(run.model_config(1, -1, 8, 70), runtime(base), 0)
    with pytest.raises(ValueError, match="precision 'int3' is unknown"):
        precision.accept_weights(model, {precision.QUANTIZED: {"precision": "int3"}})
