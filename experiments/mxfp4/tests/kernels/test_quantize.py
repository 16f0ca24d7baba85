"""The quantizing kernels, interpreted or on a GPU, bit for bit against `reference`."""

import math
from typing import Any

import pytest
import torch

from experiments.mxfp4.kernels.quantize import quantize
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer, ScaledTensor
from experiments.mxfp4.tests.support import DEVICE, assert_same, matrix
from nanochat.kernels import rms_norm
from nanochat.kernels.launch import Config

SEED, STREAM, SIGNS = 0x1234_5678_9ABC_DEF0, 5, 0x8A5C_3E71


QUANTIZERS = [
    Quantizer.parse(text)
    for text in (
        "mxfp4 even",
        "mxfp4 floor",
        "mxfp4 rceil",
        "mxfp4 rceil stochastic",
        "mxfp4 even hadamard",
        "mxfp4 rceil stochastic hadamard",
        "mxfp8_e4m3 even",
        "mxfp8_e5m2 rceil hadamard",
        "nvfp4",
        "nvfp4 stochastic",
    )
]


def wanted(x: torch.Tensor, q: Quantizer, transposed: bool, **more: Any) -> ScaledTensor:
    scale = reference.tensor_scale(x) if q.format == "nvfp4" else None
    x = x.mT.contiguous() if transposed else x
    options: dict[str, Any] = {"seed": SEED, "stream": STREAM, "scale": scale} | more
    return reference.quantize(x, q, transposed=transposed, **options)


def of_kernel(x: torch.Tensor, q: Quantizer, columns: Quantizer | None, **more: Any) -> Any:
    options: dict[str, Any] = {
        "seed": torch.tensor(SEED, device=DEVICE),
        "stream": STREAM,
        "scale": reference.tensor_scale(x),
    }
    return quantize(x, q, columns, **(options | more))


@pytest.mark.long
@pytest.mark.parametrize("q", QUANTIZERS, ids=str)
def test_rows_and_columns_equal_the_reference(q: Quantizer) -> None:
    for shape in ((32, 32), (96, 160)):
        x = matrix(*shape)
        rows, columns = of_kernel(x, q, q)
        assert_same(rows, wanted(x, q, False))
        assert_same(columns, wanted(x, q, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_and_any_strides(dtype: torch.dtype) -> None:
    wide = matrix(40, 200, dtype)
    for x in (matrix(1, 64, dtype), matrix(7, 32, dtype), wide[3:8, 33:97], wide[:8].mT[:64].mT):
        rows, columns = quantize(x, Quantizer())
        assert columns is None
        assert_same(rows, wanted(x.contiguous(), Quantizer(), False))
    rows, columns = quantize(wide[:32, 33:97], None, Quantizer())
    assert rows is None
    assert_same(columns, wanted(wide[:32, 33:97], Quantizer(), True))


def test_float32_data_of_every_magnitude() -> None:
    """Ties, subnormals and the largest floats, in every mode."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16, 128, generator=generator)
    tails = torch.exp(8 * normal) * normal.sign()
    ties = torch.randint(-26, 27, (16, 128), generator=generator) / 4.0
    x = torch.cat([normal, tails, ties, normal * 1e-38, normal * 1e-42, normal.clamp(-3, 3) * 1e38])
    x = torch.cat([x, torch.zeros(16, 128)]).to(DEVICE)
    for mode in ("even", "floor", "rceil"):
        for name in ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"):
            rows, _ = quantize(x, Quantizer(name, mode))
            assert_same(rows, reference.quantize(x, Quantizer(name, mode)))


def test_each_orientation_has_its_own_quantizer() -> None:
    x = matrix(64, 128)
    eight, four = Quantizer("mxfp8_e4m3"), Quantizer(hadamard=True)
    rows, columns = quantize(x, eight, four)
    assert_same(rows, wanted(x, eight, False))
    assert_same(columns, wanted(x, four, True))


@pytest.mark.parametrize("text", ["mxfp4 even hadamard", "mxfp4 rceil stochastic hadamard"])
def test_signs_of_the_hadamard_transform(text: str) -> None:
    x, q = matrix(64, 96), Quantizer.parse(text)
    signs = torch.tensor(SIGNS, device=DEVICE)
    rows, columns = of_kernel(x, q, q, signs=signs)
    assert_same(rows, wanted(x, q, False, signs=signs))
    assert_same(columns, wanted(x, q, True, signs=signs))
    plain, _ = of_kernel(x, q, None)
    assert not torch.equal(plain.codes, rows.codes)


@pytest.mark.long
def test_tiles_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q = matrix(32, 160), Quantizer.parse("mxfp4 rceil stochastic")
    calls = [{"prologue": prologue} for prologue in ("none", "rms_norm")]
    first = [of_kernel(x, q, q, **call) for call in calls]
    tiles = {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4}
    monkeypatch.setattr(Config, "choose", lambda config, like: tiles)
    for call, pair in zip(calls, first, strict=True):
        for one, other in zip(pair, of_kernel(x, q, q, **call), strict=True):
            assert_same(one, other)


QUANTIZED = [(Quantizer(), Quantizer()), (Quantizer("mxfp8_e4m3"), Quantizer(hadamard=True))]


@pytest.mark.parametrize(("rows", "columns"), QUANTIZED, ids=["mxfp4", "mxfp8 and hadamard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_relu2_fused_is_relu2_then_quantize(
    rows: Quantizer, columns: Quantizer, dtype: torch.dtype
) -> None:
    x = matrix(96, 160, dtype)
    post = x.float().relu().square().to(dtype)
    got = quantize(x, rows, columns, prologue="relu2")
    assert_same(got[0], wanted(post, rows, False))
    assert_same(got[1], wanted(post, columns, True))


@pytest.mark.parametrize(("rows", "columns"), QUANTIZED, ids=["mxfp4", "mxfp8 and hadamard"])
def test_rms_norm_fused_is_rms_norm_then_quantize(rows: Quantizer, columns: Quantizer) -> None:
    for shape in ((32, 96), (96, 160), (160, 384)):
        x = matrix(*shape)
        y = rms_norm.triton_rms_norm(x)
        got = quantize(x, rows, columns, prologue="rms_norm")
        assert_same(got[0], wanted(y, rows, False))
        assert got[1] is not None
        # a transform of unlike magnitudes: sums in another order differ in their last bit
        unlike = (got[1].codes != wanted(y, columns, True).codes).float().mean()
        assert unlike < 1e-3 * columns.hadamard + 1e-9


@pytest.mark.parametrize(
    ("text", "bad", "prologue"),
    [
        ("mxfp4", math.nan, "none"),
        ("mxfp4", math.inf, "none"),
        ("mxfp8_e4m3", -math.inf, "none"),
        ("nvfp4", math.nan, "none"),
        ("nvfp4", math.inf, "relu2"),
        ("mxfp4 hadamard", -math.inf, "none"),
        ("mxfp4", math.nan, "relu2"),
        ("mxfp4", math.nan, "rms_norm"),
        ("mxfp4", math.inf, "rms_norm"),
    ],
)
def test_nan_and_infinity_become_nan_blocks(text: str, bad: float, prologue: str) -> None:
    x = matrix(32, 64)
    x[3, 40] = bad
    q = Quantizer.parse(text)
    rows, columns = quantize(x, q, q, prologue=prologue, scale=torch.tensor(1.0, device=DEVICE))
    assert rows is not None
    assert columns is not None
    block = slice(32, 48) if text == "nvfp4" else slice(32, 64)
    assert reference.dequantize(rows)[3, block].isnan().all()
    assert reference.dequantize(columns)[40, :16].isnan().all()
    assert reference.dequantize(rows)[:3].isfinite().all()


def test_fused_arguments_are_checked() -> None:
    x = matrix(40, 64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rows": None}, "nothing to quantize"),
        ({"rows": Quantizer(), "prologue": "gelu"}, "choose one of none, relu2, rms_norm"),
        ({"rows": None, "columns": Quantizer()}, "40 columns do not divide into blocks of 32"),
        ({"rows": Quantizer.parse("mxfp4 rceil stochastic")}, "needs a seed"),
        ({"rows": Quantizer("nvfp4")}, "scale=reference.tensor_scale"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize(x, **arguments)
