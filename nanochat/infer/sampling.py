"""Draw the next token of every row, each row with settings and random numbers of its own.

    p      softmax(logits / temperature) over the top_k most likely tokens, and of these over the
           smallest set that holds a share top_p of the probability
    token  the first one whose cumulative probability, in vocabulary order, exceeds u
    u      output number `position` of the generator SplitMix64 whose state is the row's key

The token depends on nothing but the row's own logits, settings, key and position.
Tokens tied with the last one allowed are allowed too, so that ties do not depend on an order.

Letters  B rows, V vocabulary, K most likely tokens considered.
Source   SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators";
         top-p: arXiv:1904.09751.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
MIX_LAST_SHIFT = 31
WORD = 2**64
MIN_TEMPERATURE = 1e-6  # a softcapped logit divided by it is far from the end of float32
MAX_TEMPERATURE = 1e6  # every token is as likely as any other; float32 holds it


@dataclass(frozen=True)
class SamplingSettings:
    """How one row is sampled.

    temperature  0 takes the most likely token.
    top_k        sample among the k most likely tokens; None or 0 is all.
    top_p        sample among the most likely that hold this share of the probability; 1 is all.
    seed         any integer; sample: which of the independent samples with this seed.
    Raises       ValueError outside 0 <= temperature, 0 <= top_k, 0 < top_p <= 1, 0 <= sample.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 42
    sample: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be positive, or 0 or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1 (all tokens)")
        if self.sample < 0:
            raise ValueError(f"sample {self.sample} must not be negative")

    def num_candidates(self, vocab_size: int) -> int:
        """How many of the most likely tokens must be considered; 0 if none is excluded."""
        if self.temperature == 0:
            return 0
        if 0 < (self.top_k or 0) < vocab_size:
            return self.top_k or 0
        return vocab_size if self.top_p < 1 else 0

    def key(self) -> int:
        """State of the row's generator, as a signed 64-bit integer."""
        return _signed(_mix((self.seed + GOLDEN_GAMMA * (self.sample + 1)) % WORD))


class SamplingRows:
    """The settings of B rows on the device.

    temperature, top_p (B,) float32; top_k, key, position (B,) int64. `position` counts the tokens
    a row has drawn.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.temperature = torch.zeros(num_rows, device=device)
        self.top_p = torch.ones(num_rows, device=device)
        self.top_k = torch.full((num_rows,), vocab_size, dtype=torch.int64, device=device)
        self.key = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def assign(self, row: int, settings: SamplingSettings) -> None:
        """Give a row new settings; it begins at position 0."""
        temperature = settings.temperature
        bounded = min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
        self.temperature[row] = bounded if temperature else 0.0
        self.top_p[row] = settings.top_p
        self.top_k[row] = min(settings.top_k or self.vocab_size, self.vocab_size)
        self.key[row] = settings.key()
        self.position[row] = 0


def sample(logits_BV: Tensor, rows: SamplingRows, num_candidates: int) -> Tensor:
    """Ids (B,) int64 of the first B rows.

    num_candidates  largest `SamplingSettings.num_candidates` of the rows.
    """
    # 1. Temperature; greedy rows are divided by 1 and decided by argmax at the end.
    count = logits_BV.shape[0]
    temperature = rows.temperature[:count, None]
    scaled = logits_BV / torch.where(temperature > 0, temperature, 1)
    # 2. Exclude what top_k and top_p do not allow.
    if num_candidates:
        lowest = _lowest_allowed(scaled, rows.top_k[:count], rows.top_p[:count], num_candidates)
        allowed = scaled.masked_fill(scaled < lowest[:, None], float("-inf"))
    else:
        allowed = scaled
    # 3. Invert the cumulative distribution at u. In float32 the sum over a large vocabulary would
    # be off by more than the probability of rare tokens; MPS has no float64.
    exact = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    cumulative = allowed.softmax(dim=-1).cumsum(dim=-1, dtype=exact)
    u = uniform(rows.key[:count], rows.position[:count], exact)
    drawn = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
    drawn = drawn[:, 0].clamp(max=logits_BV.shape[1] - 1)
    return torch.where(temperature[:, 0] > 0, drawn, logits_BV.argmax(dim=-1))


def _lowest_allowed(scaled_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, K: int) -> Tensor:
    """The lowest scaled logit (B,) that top_k and top_p allow.

    One row with top_k = 3, top_p = 0.7 and probabilities .5 .3 .2 among its best three: the tokens
    more likely than each hold 0, .5 and .8, so the first two are inside, and the second's logit is
    the lowest allowed.
    """
    best_BK = scaled_BV.topk(K).values
    rank = torch.arange(K, device=best_BK.device)
    probabilities = best_BK.masked_fill(rank >= top_k_B[:, None], float("-inf")).softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities
    inside = ((likelier < top_p_B[:, None]) | (top_p_B[:, None] == 1)) & (rank < top_k_B[:, None])
    # the likeliest token stays, even if top_p is so small that float32 makes it 0
    last = (inside.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    lowest = best_BK.gather(1, last)[:, 0]
    unlimited = (top_k_B > K) & (top_p_B == 1)
    return lowest.masked_fill(unlimited, float("-inf"))


def uniform(key_B: Tensor, position_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers (B,) in [0, 1): output number `position` of SplitMix64 from state `key`."""
    z = key_B + _signed(GOLDEN_GAMMA) * (position_B + 1)  # int64 products wrap around
    for shift, factor in MIX_STEPS:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    z = z ^ _shift_right(z, MIX_LAST_SHIFT)
    bits = 52 if dtype == torch.float64 else 23  # below 1 even after the product with the total
    return _shift_right(z, 64 - bits).to(dtype) * 2.0**-bits


def _shift_right(z: Tensor, shift: int) -> Tensor:
    """The shift of unsigned words: int64's own copies the sign."""
    return (z >> shift) & (2 ** (64 - shift) - 1)


def _mix(z: int) -> int:
    for shift, factor in MIX_STEPS:
        z = ((z ^ (z >> shift)) * factor) % WORD
    return z ^ (z >> MIX_LAST_SHIFT)


def _signed(word: int) -> int:
    word %= WORD
    return word - WORD if word >= WORD // 2 else word
