"""A few rows times a weight in MXFP4, against float64."""

import pytest
import torch

from experiments.mxfp4.kernels.gemv import gemv
from experiments.mxfp4.numbers import layout, reference
from experiments.mxfp4.numbers.formats import Quantizer, ScaledTensor
from experiments.mxfp4.tests.support import DEVICE, operand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_gemv_is_within_rounding_of_float64(rows: int, dtype: torch.dtype) -> None:
    for n, k in ((8, 544), (70, 96)):
        w = operand(n, k, Quantizer(), 1)
        x = torch.randn(rows, k).to(dtype).to(DEVICE)
        want = x.double() @ reference.dequantize(w, torch.float64).mT
        eager = (x @ reference.dequantize(w, dtype).mT).double()
        got = gemv(x, w)
        assert got.dtype == dtype
        assert (got - want).square().mean() <= 4 * (eager - want).square().mean() + 1e-12


def test_gemv_reads_every_code_and_scale() -> None:
    """One-hot rows of x give back the columns of the weight, exactly."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    scales = torch.tensor([43, 44, 63, 64, 120, 127, 128, 140, 190, 191, 50, 99, 100, 110, 126, 90])
    w = ScaledTensor(
        codes.to(DEVICE), layout.swizzle_scales(scales.repeat(3, 1).to(torch.uint8)).to(DEVICE),
        "mxfp4", 512,
    )  # fmt: skip
    want = reference.dequantize(w)
    for start in range(0, 512, 48):
        x = torch.eye(512)[start : start + 16].to(DEVICE)
        assert torch.equal(gemv(x, w), want[:, start : start + 16].mT)


def test_gemv_arguments_are_checked() -> None:
    w = operand(8, 64, Quantizer(), 0)
    for x, weight, message in (
        (torch.zeros(17, 64), w, "1 to 16 rows, got 17"),
        (torch.zeros(1, 96), w, r"needs x \(M, 64\)"),
        (torch.zeros(1, 64), operand(8, 64, Quantizer("nvfp4"), 0), "and nvfp4"),
    ):
        with pytest.raises(ValueError, match=message):
            gemv(x.to(DEVICE), weight)
