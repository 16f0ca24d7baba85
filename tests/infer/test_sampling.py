"""Sampled tokens against their distribution, the generator against its published output."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from nanochat.infer import sampling
from nanochat.infer.sampling import SamplingRows, SamplingSettings, sample, uniform

VOCAB = 40
DRAWS = 20_000


def draw(logits: torch.Tensor, settings: list[SamplingSettings]) -> torch.Tensor:
    """One token of each row."""
    rows = SamplingRows(len(settings), logits.shape[-1], torch.device("cpu"))
    for row, each in enumerate(settings):
        rows.assign(row, each)
    candidates = max(each.num_candidates(logits.shape[-1]) for each in settings)
    return sample(logits.expand(len(settings), -1), rows, candidates)


def expected(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list:
    """The distribution, written out with loops."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept, mass = [], 0.0
    total = sum(weights[i] for i in order[: top_k or None])
    for i in order[: top_k or None]:
        if mass / total >= top_p:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.long
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, 1.0),
        (0.5, None, 1.0),
        (2.0, 0, 1.0),
        (1.0, 5, 1.0),
        (0.7, 12, 1.0),
        (1.0, None, 0.6),
        (1.3, None, 0.9),
        (1.3, 12, 0.5),
        (1.0, 1000, 1.0),
    ],
)
def test_tokens_follow_their_distribution(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    settings = [SamplingSettings(temperature, top_k, top_p, 7, i) for i in range(DRAWS)]
    found = Counter(draw(logits, settings).tolist())
    wanted = expected(logits.tolist(), temperature, top_k, top_p)
    assert set(found) <= {i for i, p in enumerate(wanted) if p > 0}
    frequent = [i for i, p in enumerate(wanted) if p * DRAWS >= 5]
    chi_square = sum((found[i] - wanted[i] * DRAWS) ** 2 / (wanted[i] * DRAWS) for i in frequent)
    freedom = len(frequent) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert len(found) >= len(frequent)


def test_rows_of_a_batch_keep_their_own_settings() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))
    kinds = [(1.0, None, 1.0), (0.0, None, 1.0), (1.0, 3, 1.0), (1.0, None, 0.5), (0.5, 7, 0.9)]
    mixed = [SamplingSettings(*kinds[i % 5], seed=i) for i in range(500)]
    together = draw(logits, mixed).tolist()
    alone = [draw(logits, [each]).item() for each in mixed]
    assert together == alone
    assert set(together[1::5]) == {int(logits.argmax())}
    assert len(set(together[0::5])) > 20
    assert set(together[2::5]) == set(logits.topk(3).indices.tolist())


def test_an_unlimited_row_beside_a_limited_one_keeps_all_tokens() -> None:
    pair = [SamplingSettings(seed=1), SamplingSettings(top_k=2, seed=1)]
    settings = [replace(pair[i % 2], sample=i) for i in range(2000)]
    tokens = draw(torch.zeros(VOCAB).index_fill(0, torch.tensor([0, 1]), 1.0), settings)
    assert len(set(tokens[0::2].tolist())) == VOCAB
    assert set(tokens[1::2].tolist()) == {0, 1}


def test_the_smallest_random_number_takes_an_allowed_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda keys, *_: torch.zeros(keys.shape).double())
    logits = torch.arange(VOCAB).float()
    assert draw(logits, [SamplingSettings(top_k=3)]).tolist() == [VOCAB - 3]


def test_samples_and_seeds_and_positions_are_independent() -> None:
    logits = torch.zeros(1000)
    rows = SamplingRows(1, 1000, torch.device("cpu"))
    streams = {}
    for seed, index in ((1, 0), (1, 1), (2, 0), (2, 1)):
        rows.assign(0, SamplingSettings(seed=seed, sample=index))
        tokens = []
        for _ in range(50):
            tokens.append(sample(logits[None], rows, 0).item())
            rows.position += 1
        streams[seed, index] = tokens
    for key, tokens in streams.items():
        assert len(set(tokens)) > 40
        assert all(
            sum(a == b for a, b in zip(tokens, other, strict=True)) < 4
            for name, other in streams.items()
            if name != key
        )
        shifted = [other[i:] for name, other in streams.items() if name != key for i in range(5)]
        assert all(tokens[: len(other)] != other for other in shifted)


def test_generator_is_splitmix64() -> None:
    # the published first outputs for state 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys, positions = torch.full((3,), 1234567), torch.arange(3)
    got = uniform(keys, positions, torch.float64).tolist()
    assert got == [(word >> 12) / 2**52 for word in published]


def test_uniform_numbers_are_below_one_in_both_precisions() -> None:
    keys = torch.arange(100_000)
    for dtype in (torch.float64, torch.float32):
        u = uniform(keys, torch.zeros_like(keys), dtype)
        assert u.dtype == dtype
        assert u.min() >= 0
        assert u.max() < 1
        assert u.mean().item() == pytest.approx(0.5, abs=0.005)
        assert u.std().item() == pytest.approx(12**-0.5, abs=0.005)


def test_tokens_as_likely_as_the_last_one_are_let_in() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 1.0, -9.0])
    settings = [SamplingSettings(top_k=2, seed=seed) for seed in range(300)]
    assert set(draw(logits, settings).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7])
def test_no_temperature_is_too_low(temperature: float) -> None:
    logits = torch.tensor([-15.0, 14.0, 15.0])
    assert draw(logits, [SamplingSettings(temperature=temperature)]).tolist() == [2]


@pytest.mark.parametrize("top_p", [1e-46, 1e-300, 5e-324, 1 - 1e-17])
@pytest.mark.parametrize("top_k", [None, 1, 7, 10**30])
def test_no_share_is_too_small(top_p: float, top_k: int | None) -> None:
    logits = torch.arange(VOCAB).float()
    (token,) = draw(logits, [SamplingSettings(top_k=top_k, top_p=top_p)]).tolist()
    assert token == VOCAB - 1 or top_p > 0.5


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_the_highest_temperatures_make_all_tokens_alike(temperature: float) -> None:
    logits = torch.tensor([-15.0, 0.0, 15.0])
    settings = [SamplingSettings(temperature=temperature, seed=seed) for seed in range(90)]
    assert set(draw(logits, settings).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("seed", [-5, 0, 2**64 + 3, 2**200])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert -(2**63) <= SamplingSettings(seed=seed).key() < 2**63


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"sample": -1}, "sample -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**settings)
