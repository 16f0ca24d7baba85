"""The random numbers of a training step: functions of seed, step, micro-batch and rank alone.

A checkpoint holds none of them: a resumed run draws what the uninterrupted one would have drawn.
The four numbers are the bits of one int64, so that no two calls share a seed:

    seed 15 bits | rank 12 | step 24 | micro-batch 12
"""

import random

import torch

from experiments.mxfp4.numbers.randomness import HADAMARD

MICRO_BATCH_BITS = 12
STEP_BITS = 24
RANK_BITS = 12
SEED_BITS = 15  # together 63: an int64 that is not negative
# One draw, kept for all runs. Without signs the all-ones row of the transform collects what the
# tokens of a block share: 2.2 times the error on attention outputs (results/errors_d4.json,
# attn.c_proj x^T).
FIXED_SIGNS = 0x5A17C3E9


class StepRandomness:
    """Tensors that every quantized layer reads; kernels take them without waiting for the CPU.

    seed   int64 (): of stochastic rounding, different in every step, micro-batch and rank
    signs  int64 () or None: of the Hadamard transforms, the same on every rank; "random" draws
           new ones every step, "fixed" keeps one draw throughout, "none" flips none
    """

    def __init__(
        self, device: torch.device | str, seed: int = 0, rank: int = 0, signs: str = "fixed"
    ) -> None:
        self.base_seed, self.rank = seed % 2**SEED_BITS, rank % 2**RANK_BITS
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.signs = None if signs == "none" else torch.full_like(self.seed, FIXED_SIGNS)
        self.draws_signs = signs == "random"
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Draw the numbers of this step."""
        value = self.base_seed
        for part, bits in ((self.rank, RANK_BITS), (step, STEP_BITS), (0, MICRO_BATCH_BITS)):
            value = value << bits | part % 2**bits
        self.seed.fill_(value)
        if self.signs is not None and self.draws_signs:
            self.signs.fill_(random.Random(f"{self.base_seed} {step}").getrandbits(HADAMARD))

    def begin_micro_batch(self) -> None:
        """The next seed of this step."""
        self.seed += 1
