"""Randomness of a quantizer: the bits of stochastic rounding and the random Hadamard transform.

Bits come from the counter-based generator Philox4x32-10: the words of one call serve eight elements
next to each other in a row, 16 bits each, low half first. Element (2, 19) of a matrix of 64 columns
is number 147: call 147 // 8 = 18, and of its eight pieces the one at 147 % 8 = 3, which is the high
half of the second word. No state is kept: equal (seed, stream, orientation) give equal bits on
every device, whatever the tile sizes.
Source  J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

import torch
from torch import Tensor

HADAMARD = 32  # channels that one transform mixes: the block of the MX formats
ELEMENTS_PER_CALL = 8
ROUNDS = 10  # the generator's own margin; 7 are the fewest that pass BigCrush
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Four random words for each four counter words.

    counter, key, result  int64 of values 0 .. 2^32 - 1
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # the low 64 bits of a product survive int64's wrap-around
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def random_bits(
    rows: int,
    columns: int,
    seed: int | Tensor,
    stream: int,
    transposed: bool,
    device: torch.device,
) -> Tensor:
    """(rows, columns) int64 of 16 random bits each; columns a multiple of 8, seed of 64 bits."""
    calls = torch.arange(rows * columns // ELEMENTS_PER_CALL, device=device)
    counter = (calls & WORD, calls >> 32, calls * 0 + stream, calls * 0 + int(transposed))
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(rows, columns)


def hadamard_matrix(device: torch.device) -> Tensor:
    """Sylvester's matrix of +-1, (32, 32) float32: entry (i, j) is (-1)^popcount(i and j)."""
    # every entry at once: the parity of the bits that row and column index have in common
    index = torch.arange(HADAMARD, device=device)
    common = index[:, None] & index
    parity = torch.stack([common >> bit & 1 for bit in range(5)]).sum(0) % 2
    return 1.0 - 2.0 * parity.float()


def hadamard(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """Each 32 channels of x (..., K) times diag(+-1) H / sqrt(32), in float32.

    The transform is orthogonal, so that hadamard(a) hadamard(b)^T = a b^T for equal signs.
    signs  int64 (): channels whose bit is set are negated first; None is no sign.
    Error  x is rounded to bfloat16 first: the tensor cores of the kernels multiply no more.
    """
    blocks = x.bfloat16().float().reshape(-1, HADAMARD)  # contiguous: one product
    if signs is not None:
        bits = signs.to(x.device) >> torch.arange(HADAMARD, device=x.device) & 1
        blocks = blocks * (1.0 - 2.0 * bits)
    return (blocks @ hadamard_matrix(x.device) * HADAMARD**-0.5).view(x.shape)
