"""How codes and scales lie in memory: two nibbles a byte, scales in tiles of 512 bytes.

A tile holds the scales of 128 rows and 4 blocks: that of row r and block c is at byte
16 (r mod 32) + 4 (r div 32) + c. Tiles follow one another along a row of tiles, then down:

    row 0    bytes 0 1 2 3        row 1    16 17 18 19       ...    row 31    496 497 498 499
    row 32         4 5 6 7        row 33   20 21 22 23       ...    row 63    500 501 502 503
    row 64         8 9 10 11      and so on to row 127, which ends the tile at byte 511

so that 16 consecutive bytes serve rows r, r + 32, r + 64 and r + 96. This is the order in which
tensor cores, cuBLAS and CUTLASS read them (cuBLAS documentation, "1D Block Scaling Factors Layout";
SWIZZLE_32_4_4 in PyTorch).
"""

import torch
from torch import Tensor

TILE_ROWS = 128
TILE_BLOCKS = 4


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., K) codes 0..15 -> (..., K / 2) bytes: element 2 i low, element 2 i + 1 high."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(..., K / 2) bytes -> (..., K) codes 0..15, uint8: the inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def swizzled_shape(rows: int, blocks: int) -> tuple[int, int, int]:
    """Shape of the swizzled scales of (rows, blocks): tiles down, tiles along, 512 bytes."""
    return -(-rows // TILE_ROWS), -(-blocks // TILE_BLOCKS), TILE_ROWS * TILE_BLOCKS


def swizzle_scales(scales: Tensor) -> Tensor:
    """(rows, blocks) uint8 -> `swizzled_shape`, uint8; absent rows and blocks are 0, never NaN."""
    rows, blocks = scales.shape
    down, along, size = swizzled_shape(rows, blocks)
    padded = scales.new_zeros(down * TILE_ROWS, along * TILE_BLOCKS)
    padded[:rows, :blocks] = scales
    tiles = padded.view(down, 4, 32, along, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down, along, size)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of `swizzle_scales`, without the padding: (rows, blocks) uint8."""
    down, along, _ = swizzled.shape
    tiles = swizzled.view(down, along, 32, 4, TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * TILE_ROWS, along * TILE_BLOCKS)[:rows, :blocks].contiguous()
