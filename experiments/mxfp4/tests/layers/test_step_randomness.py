"""Random numbers of a step are functions of seed, step, micro-batch and rank."""

import torch

from experiments.mxfp4.layers.step_randomness import FIXED_SIGNS, StepRandomness
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer
from experiments.mxfp4.numbers.randomness import hadamard


def test_random_numbers_of_a_step_are_a_function_of_step_micro_batch_and_rank() -> None:
    seen = {}
    for rank in (0, 1):
        drawn = StepRandomness("cpu", seed=42, rank=rank, signs="random")
        for step in (0, 1, 2**20):
            drawn.begin_step(step)
            for micro_batch in range(3):
                assert drawn.signs is not None
                seen[int(drawn.seed)] = (rank, step, micro_batch)
                drawn.begin_micro_batch()
    assert len(seen) == 18
    assert min(seen) >= 0
    ranks = [StepRandomness("cpu", 42, rank, "random") for rank in (0, 1)]
    signs = [int(drawn.signs) for drawn in ranks if drawn.signs is not None]
    assert signs[0] == signs[1], "gradients of all ranks are summed"


def test_signs_of_a_policy() -> None:
    def drawn(signs: str) -> list[int | None]:
        source, found = StepRandomness("cpu", 1, signs=signs), []
        for step in (0, 1, 0):
            source.begin_step(step)
            found.append(None if source.signs is None else int(source.signs))
        return found

    assert drawn("none") == [None] * 3
    assert drawn("fixed") == [FIXED_SIGNS] * 3
    first, second, again = drawn("random")
    assert first == again != second


def test_fixed_signs_keep_a_mean_shared_by_tokens_from_costing_precision() -> None:
    """Attention outputs of neighbouring tokens have one: without signs one coefficient takes it."""
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) + 2.0
    quantizer, errors = Quantizer(hadamard=True), []
    for signs in (None, torch.tensor(FIXED_SIGNS)):
        t = reference.quantize(x.mT, quantizer, signs=signs)
        v = hadamard(x.mT, signs)
        errors.append(float((reference.dequantize(t) - v).square().sum() / v.square().sum()))
    assert errors[0] > 1.2 * errors[1]
