"""The random numbers of a training step: functions of seed, step, micro-batch and rank alone.

Nothing of it is in a checkpoint: a resumed run draws what the uninterrupted one would have drawn.
"""

import random

import torch

from experiments.mxfp4.numbers.randomness import HADAMARD

MICRO_BATCH_BITS = 12
STEP_BITS = 24
RANK_BITS = 12
SEED_BITS = 15  # together 63: an int64 that is not negative
# One draw for ever. Without signs the all-ones row of the transform collects what the tokens of a
# block share: 2.2 times the error on attention outputs (results/errors_d4.json, attn.c_proj x^T).
FIXED_SIGNS = 0x5A17C3E9


class StepRandomness:
    """Tensors that every quantized layer reads; kernels take them without waiting for the CPU.

    seed   int64 (): of stochastic rounding, another for every step, micro-batch and rank
    signs  int64 () or None: of the Hadamard transforms, the same on every rank; "random" draws
           others every step, "fixed" is one draw for ever, "none" flips none
    """

    def __init__(
        self, device: torch.device | str, seed: int = 0, rank: int = 0, signs: str = "fixed"
    ) -> None:
        self.number, self.rank = seed % 2**SEED_BITS, rank % 2**RANK_BITS
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.signs = None if signs == "none" else torch.full_like(self.seed, FIXED_SIGNS)
        self.draws_signs = signs == "random"
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Draw the numbers of this step."""
        value = self.number
        for part, bits in ((self.rank, RANK_BITS), (step, STEP_BITS), (0, MICRO_BATCH_BITS)):
            value = value << bits | part % 2**bits
        self.seed.fill_(value)
        if self.signs is not None and self.draws_signs:
            self.signs.fill_(random.Random(f"{self.number} {step}").getrandbits(HADAMARD))

    def begin_micro_batch(self) -> None:
        """The next seed of this step."""
        self.seed += 1
