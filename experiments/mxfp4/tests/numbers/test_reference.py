"""Quantizing in PyTorch against ml_dtypes, and torchao where it is installed."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.mxfp4.numbers import layout, randomness, reference
from experiments.mxfp4.numbers.formats import E2M1_VALUES, FORMATS, Quantizer
from experiments.mxfp4.numbers.reference import dequantize, quantize

ELEMENTS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


MX = [name for name, fmt in FORMATS.items() if fmt.scale == "e8m0"]


MODES = ("floor", "rceil", "even")


def finite_bfloat16() -> torch.Tensor:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    return patterns[patterns.isfinite()].float()


def inputs() -> dict[str, torch.Tensor]:
    """Matrices (16, 128) of kinds that break quantizers."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(16, 128, generator=generator)

    halves = torch.randint(-26, 27, (16, 128), generator=generator) / 4.0
    return {
        "normal": normal(),
        "bfloat16": normal().bfloat16(),
        "heavy tails": torch.exp(4 * normal()) * normal().sign(),
        "ties": halves,
        "tiny": normal() * 1e-38,
        "huge": normal().clamp(-3, 3) * 1e38,
        "sparse": normal() * (normal() > 2),
        "powers of two": torch.exp2(torch.randint(-8, 9, (16, 128), generator=generator).float()),
        "zeros": torch.zeros(16, 128),
    }


INPUTS = inputs()


def numpy_scale(block: np.ndarray, name: str, mode: str) -> float:
    """The scale rule of `formats`, in exact arithmetic of mantissa and exponent (float64)."""
    fmt = FORMATS[name]
    largest = float(np.abs(block).max())
    if largest == 0:
        return 2.0**-127
    mantissa, exponent = math.frexp(largest)  # largest = mantissa 2^exponent, mantissa in [.5, 1)
    if mode == "even":  # half of the last mantissa bit up, then cut: may carry into the exponent
        carries = mantissa * 2 + 2.0 ** -(fmt.mantissa_bits + 1) >= 2
        power = exponent - 1 + carries - fmt.exponent
    elif mode == "rceil":
        power = next(p for p in range(-300, 300) if largest <= fmt.element_max * 2.0**p)
    else:
        power = exponent - 1 - fmt.exponent
    return 2.0 ** max(power, -127)


def numpy_quantize(x: torch.Tensor, name: str, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scale bytes by ml_dtypes: the nearest element of x / scale, times the scale."""
    fmt = FORMATS[name]
    blocks = x.double().numpy().reshape(-1, fmt.block)
    scales = np.array([numpy_scale(block, name, mode) for block in blocks])
    scaled = (blocks / scales[:, None]).clip(-fmt.element_max, fmt.element_max)
    values = scaled.astype(np.float32).astype(ELEMENTS[fmt.element]).astype(np.float64)
    bytes_ = scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    return (values * scales[:, None]).reshape(x.shape), bytes_.reshape(x.shape[0], -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("kind", INPUTS)
def test_mx_formats_equal_ml_dtypes(name: str, mode: str, kind: str) -> None:
    x = INPUTS[kind]
    got = quantize(x, Quantizer(name, mode))
    values, bytes_ = numpy_quantize(x, name, mode)
    scales = layout.unswizzle_scales(got.scales, *bytes_.shape)
    assert np.array_equal(scales.numpy(), bytes_)
    assert np.array_equal(dequantize(got, torch.float64).numpy(), values)


def test_the_block_of_the_documentation() -> None:
    """The example by hand in `formats`, to its bytes; and 13 and 15 in place of 11."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([0.7, -2.6, 11, 0.1])
    for mode in MODES:
        got = quantize(x, Quantizer("mxfp4", mode))
        assert got.codes.tolist() == [[0xB1, 0x07] + 14 * [0]]
        assert layout.unswizzle_scales(got.scales, 1, 1).tolist() == [[128]]
        assert dequantize(got)[0, :4].tolist() == [1, -3, 12, 0]
    results = {
        13: {"floor": (2, 12), "rceil": (4, 12), "even": (2, 12)},
        15: {"floor": (2, 12), "rceil": (4, 16), "even": (4, 16)},
    }
    for largest, wanted in results.items():
        x[0, 2] = largest
        for mode, (scale, value) in wanted.items():
            got = quantize(x, Quantizer("mxfp4", mode))
            assert reference.block_scales(got).item() == scale
            assert dequantize(got)[0, 2] == value


def test_codes_are_those_of_ml_dtypes() -> None:
    """Bytes read by ml_dtypes alone, from codes to values: nibble order, scale bytes."""
    x = INPUTS["normal"]
    got = quantize(x, Quantizer("mxfp4", "even"))
    nibbles = np.stack([got.codes.numpy() & 15, got.codes.numpy() >> 4], -1).reshape(16, 128)
    elements = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = layout.unswizzle_scales(got.scales, 16, 4).numpy()
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(elements * factors.repeat(32, -1), dequantize(got).numpy())
    assert np.abs(elements * factors.repeat(32, -1) - x.numpy()).max() < 0.5


def test_elements_round_as_ml_dtypes_on_every_bfloat16() -> None:
    x = finite_bfloat16()
    want = x.numpy().clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(reference.encode_e2m1(x).numpy(), want)


@given(st.floats(-8, 8, width=32))
@settings(max_examples=300, deadline=None)
def test_elements_round_as_ml_dtypes(value: float) -> None:
    want = np.float32(value).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert reference.encode_e2m1(torch.tensor([value]))[0] == want


def test_ties_go_to_the_even_code_by_hand() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25])
    assert reference.encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8]
    assert reference.decode_e2m1(torch.arange(8)).tolist() == list(E2M1_VALUES)


def test_rceil_never_saturates_and_floor_may() -> None:
    """Magnitudes just above 6 2^k, where a rule by logarithms in float32 is one exponent short."""
    powers = torch.exp2(torch.arange(-60.0, 61.0))
    edges = torch.nextafter(6 * powers, torch.tensor(math.inf))
    x = edges[:, None] * torch.ones(32)
    largest = quantize(x, Quantizer("mxfp4", "rceil"))
    assert torch.equal(reference.block_scales(largest)[:, 0], 2 * powers)
    exact = quantize(6 * powers[:, None] * torch.ones(32), Quantizer("mxfp4", "rceil"))
    assert torch.equal(reference.block_scales(exact)[:, 0], powers)
    clipped = quantize(7.5 * torch.ones(1, 32), Quantizer("mxfp4", "floor"))
    assert dequantize(clipped)[0, 0] == 6.0


@pytest.mark.parametrize("kind", INPUTS)
def test_nvfp4_by_its_formula_in_ml_dtypes(kind: str) -> None:
    x = INPUTS[kind].float()
    got = quantize(x, Quantizer("nvfp4"))
    blocks = x.numpy().reshape(-1, 16)
    total = max(np.abs(blocks).max() / np.float32(448 * 6), np.float32(2.0**-120))
    largest = np.abs(blocks).max(-1)
    wanted = (largest / np.float32(6) / total).clip(2.0**-6, 448)
    scales = wanted.astype(ml_dtypes.float8_e4m3fn)
    reciprocal = np.float32(1) / total / scales.astype(np.float32)
    elements = (blocks * reciprocal[:, None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    want = elements.astype(np.float32) * (scales.astype(np.float32) * total)[:, None]
    assert got.tensor_scale is not None
    assert got.tensor_scale.item() == total
    assert np.array_equal(dequantize(got).numpy(), want.reshape(x.shape))


@pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind != "zeros"])
def test_nvfp4_equals_torchao(kind: str) -> None:
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = INPUTS[kind].float()
    got = quantize(x, Quantizer("nvfp4"))
    assert got.tensor_scale is not None
    scales, codes = nvfp4.nvfp4_quantize(x, 16, got.tensor_scale)
    assert torch.equal(got.codes, codes.view(torch.uint8))
    ours = layout.unswizzle_scales(got.scales, 16, 8)
    assert torch.equal(ours, scales.view(torch.uint8))


# not rceil: on the CPU torchao takes a logarithm in float32, which is wrong just above 6 2^k
@pytest.mark.parametrize("mode", ["floor", "even"])
@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind != "zeros"])
def test_mx_formats_equal_torchao(name: str, mode: str, kind: str) -> None:
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    dtype = {"e2m1": torch.float4_e2m1fn_x2, **reference.FLOAT8}[FORMATS[name].element]
    # below 2^-126 torchao multiplies by another scale than the one that it stores
    x = INPUTS[kind] * (1e8 if kind == "tiny" else 1.0)
    scale, codes = mx_tensor.to_mx(x, dtype, 32, config.ScaleCalculationMode[mode.upper()])
    got = quantize(x, Quantizer(name, mode))
    assert torch.equal(got.codes, codes.view(torch.uint8))
    assert torch.equal(layout.unswizzle_scales(got.scales, 16, 4), scale.view(torch.uint8))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_stochastic_rounding_draws_neighbours_and_is_unbiased(name: str) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    quantizer = Quantizer(name, "rceil", "stochastic")
    draws = 400
    values = torch.stack([dequantize(quantize(x, quantizer, seed=s)) for s in range(draws)])
    scales = reference.block_scales(quantize(x, quantizer)).repeat_interleave(
        FORMATS[name].block, -1
    )
    grid = torch.tensor(E2M1_VALUES)
    magnitude = (x.abs() / scales).clamp(max=6.0)  # nvfp4's own scale clips a little
    above = grid[torch.searchsorted(grid, magnitude.contiguous())]
    below = grid[(torch.searchsorted(grid, magnitude.contiguous(), right=True) - 1)]
    drawn = values.abs() / scales
    tolerance = 1e-5
    assert ((drawn - above).abs() < tolerance).logical_or((drawn - below).abs() < tolerance).all()
    fraction = (magnitude - below) / (above - below).clamp(min=tolerance)
    sigma = (above - below) * (fraction * (1 - fraction)).clamp(min=0).sqrt() / draws**0.5
    assert ((drawn.mean(0) - magnitude).abs() <= 5 * sigma + tolerance).all()
    # the mean over all elements is known 500 times better: a bias of 1/500 step shows here
    assert (drawn.mean(0) - magnitude).mean().abs() <= 5 * (sigma.square().mean() / 512).sqrt()


def test_draws_depend_on_every_part_of_their_name() -> None:
    x = torch.randn(4, 64)
    quantizer = Quantizer("mxfp4", "rceil", "stochastic")
    base = quantize(x, quantizer, seed=1, stream=2)
    assert torch.equal(base.codes, quantize(x, quantizer, seed=1, stream=2).codes)
    for seed, stream, transposed in ((2, 2, 0), (1 + 2**32, 2, 0), (1, 3, 0), (1, 2, 1)):
        other = quantize(x, quantizer, seed=seed, stream=stream, transposed=bool(transposed))
        assert not torch.equal(base.codes, other.codes)


def test_dither_does_not_leave_a_binade_downwards() -> None:
    """Below 2 steps are half as long: from 2.1 the lower neighbour is 2, never 1.5."""
    y, bits = torch.full((65536,), 2.1), torch.arange(65536)
    drawn = reference.decode_e2m1(reference.encode_e2m1(reference.dither(y, bits)))
    assert drawn.unique().tolist() == [2.0, 3.0]
    assert abs(drawn.mean().item() - 2.1) < 2**-16


def relative_error(x: torch.Tensor, quantizer: Quantizer) -> float:
    y = randomness.hadamard(x) if quantizer.hadamard else x
    return float((dequantize(quantize(x, quantizer)) - y).square().mean() / y.square().mean())


def test_errors_are_those_of_the_literature() -> None:
    """Mean squared errors on Gaussian data, over an octave of scales; even is best."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    octave = [x * 2 ** (i / 8) for i in range(8)]

    def error(quantizer: Quantizer) -> float:
        return 1e3 * sum(relative_error(y, quantizer) for y in octave) / len(octave)

    errors = {mode: error(Quantizer("mxfp4", mode)) for mode in MODES}
    assert errors["even"] < errors["floor"] < errors["rceil"]
    assert errors["even"] == pytest.approx(12.6, abs=0.3)
    assert error(Quantizer("nvfp4")) == pytest.approx(9.1, abs=0.3)
    assert error(Quantizer("mxfp8_e4m3")) < 1.0


def test_hadamard_helps_heavy_tails() -> None:
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    x = x * torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 1 / 64,
                        20.0, 1.0)  # fmt: skip
    assert relative_error(x, Quantizer(hadamard=True)) < 0.6 * relative_error(x, Quantizer())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_or_stay_visible(bad: float) -> None:
    x = torch.randn(4, 64)
    x[2, 40] = bad
    for name in FORMATS:
        with pytest.raises(ValueError, match="1 of 256 elements to quantize are NaN or infinite"):
            quantize(x, Quantizer(name))
        values = dequantize(quantize(x, Quantizer(name), propagate=True))
        assert not values[2, 32:48].isfinite().any()
        if name != "nvfp4":  # one scale for the whole tensor
            assert values[:2].isfinite().all()
            assert values[2, :32].isfinite().all()


def test_a_fault_stays_in_its_block_where_the_scale_of_the_tensor_is_given() -> None:
    x = torch.randn(4, 64)
    x[2, 40] = math.inf
    t = quantize(x, Quantizer("nvfp4"), scale=torch.tensor(2.0**-8), propagate=True)
    wrong = dequantize(t).isnan()
    assert wrong[2, 32:48].all()
    assert int(wrong.sum()) == 16
