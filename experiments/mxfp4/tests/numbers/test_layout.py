"""Nibbles and swizzled scales, by formula and against torchao where it is installed."""

import pytest
import torch

from experiments.mxfp4.numbers import layout


def test_swizzle_equals_torchao() -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.randint(0, 255, (200, 10), dtype=torch.uint8)
    assert torch.equal(layout.swizzle_scales(scales).flatten(), utils.to_blocked(scales).flatten())


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (300, 24)])
def test_swizzle_by_its_formula(shape: tuple[int, int]) -> None:
    rows, blocks = shape
    scales = torch.randint(1, 255, shape, dtype=torch.uint8)
    swizzled = layout.swizzle_scales(scales)
    assert swizzled.shape == layout.swizzled_shape(rows, blocks)
    for r, c in ((0, 0), (rows - 1, blocks - 1), (rows // 2, blocks // 2), (min(33, rows - 1), 0)):
        tile = swizzled[r // 128, c // 4]
        assert tile[16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] == scales[r, c]
    assert torch.equal(layout.unswizzle_scales(swizzled, rows, blocks), scales)
    assert int(swizzled.count_nonzero()) == scales.numel()  # padding is 0


def test_nibbles_by_hand() -> None:
    codes = torch.tensor([[1, 2, 15, 8]])
    assert layout.pack_nibbles(codes).tolist() == [[0x21, 0x8F]]
    assert layout.unpack_nibbles(layout.pack_nibbles(codes)).tolist() == codes.tolist()
