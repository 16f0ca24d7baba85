"""Quantizers as text, what is refused, sizes of what is stored."""

from typing import Any

import pytest
import torch

from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor
from experiments.mxfp4.numbers.reference import quantize


def test_quantizers_are_written_and_read() -> None:
    for text in ("mxfp4 even nearest", "mxfp4 rceil stochastic hadamard", "nvfp4 even nearest"):
        assert str(Quantizer.parse(text)) == text
    assert Quantizer.parse("mxfp8_e4m3") == Quantizer("mxfp8_e4m3")
    with pytest.raises(ValueError, match="'hadamrd' is no part of a quantizer"):
        Quantizer.parse("mxfp4 hadamrd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "mxfp5"}, "format is 'mxfp5'; choose one of mxfp4"),
        ({"scale_mode": "ceil"}, "choose one of floor, rceil, even"),
        ({"rounding": "up"}, "choose one of nearest, stochastic"),
        ({"rounding": "stochastic"}, "take scale_mode='rceil'"),
        ({"format": "mxfp8_e4m3", "rounding": "stochastic"}, "take rounding='nearest'"),
    ],
)
def test_meaningless_quantizers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer(**arguments)


@pytest.mark.parametrize(
    ("x", "quantizer", "message"),
    [
        (torch.zeros(2, 40), Quantizer(), "40 columns do not divide into blocks of 32: pad .* 64"),
        (torch.zeros(2, 40), Quantizer("nvfp4"), "blocks of 16: pad .* 48"),
        (torch.zeros(2, 48), Quantizer("nvfp4", hadamard=True), "blocks of 32"),
        (torch.zeros(2, 0), Quantizer(), "0 columns"),
        (torch.zeros(64), Quantizer(), "needs a floating-point matrix"),
        (torch.zeros(2, 64, dtype=torch.int32), Quantizer(), "needs a floating-point matrix"),
    ],
)
def test_matrices_that_do_not_divide_are_refused(
    x: torch.Tensor, quantizer: Quantizer, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(x, quantizer)


def test_bits_an_element() -> None:
    assert {name: fmt.bits for name, fmt in FORMATS.items()} == {
        "mxfp4": 4.25,
        "mxfp8_e4m3": 8.25,
        "mxfp8_e5m2": 8.25,
        "nvfp4": 4.5,
    }


def test_shape_of_a_scaled_tensor() -> None:
    got = quantize(torch.randn(5, 96), Quantizer())
    assert isinstance(got, ScaledTensor)
    assert (got.shape, got.codes.shape, got.scales.shape) == ((5, 96), (5, 48), (1, 1, 512))
