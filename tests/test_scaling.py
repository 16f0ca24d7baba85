"""Sizes, FLOPs, horizons and schedules against published figures and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import scaling
from nanochat.optim import schedule


def d(depth: int, vocab_size: int = 65_536) -> tuple[int, int, scaling.ParameterCount]:
    width = scaling.model_width(depth)
    heads = width // scaling.HEAD_DIM
    return width, heads, scaling.count_parameters(depth, width, heads, heads, vocab_size)


# depth -> parameters of karpathy/nanochat's v1 model, vocabulary 65,536
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(12, 185_597_952), (16, 335_544_320), (20, 560_988_160), (32, 1_879_048_192)],
)
def test_parameters_equal_upstream(depth: int, parameters: int) -> None:
    assert d(depth)[2].total == parameters


def test_flops_equal_upstream_d32() -> None:
    width, _, parameters = d(32)
    flops = scaling.flops_per_token(parameters, 32, width, 2048, causal=False)
    assert f"{flops:.6e}" == "1.207960e+10"
    causal = scaling.flops_per_token(parameters, 32, width, 2048, causal=True)
    assert flops - causal == 6 * 32 * width * 2048


@given(st.integers(1, 80))
def test_any_depth_gives_whole_heads(depth: int) -> None:
    width, heads, _ = d(depth)
    assert heads * 128 == width >= depth * 64 > width - 128


def test_chinchilla_horizon_of_d20() -> None:
    parameters = d(20)[2].total
    assert scaling.num_iterations(-1, -1.0, 20.0, 524_288, parameters, 1) == 21_400


def test_the_first_wish_decides_the_horizon() -> None:
    assert scaling.num_iterations(7, 1e20, 20.0, 100, 1000, 10) == 7
    assert scaling.num_iterations(-1, 1e6, 20.0, 100, 1000, 10) == 1000
    with pytest.raises(ValueError, match="--num_iterations"):
        scaling.num_iterations(-1, -1.0, -1.0, 100, 1000, 10)


def test_accumulation_divides_or_says_what_would() -> None:
    assert scaling.accumulation_steps(524_288, 32, 2048, 8) == 1
    assert scaling.accumulation_steps(524_288, 32, 2048, 1) == 8
    with pytest.raises(ValueError, match="--total_batch_size=393216"):
        scaling.accumulation_steps(524_288, 32, 2048, 3)
    with pytest.raises(ValueError, match="--total_batch_size=65536"):
        scaling.accumulation_steps(1000, 32, 2048, 1)


def test_kv_heads_divide_heads() -> None:
    assert scaling.num_kv_heads(6, -1) == 6
    assert scaling.num_kv_heads(6, 2) == 2
    with pytest.raises(ValueError, match=r"use \[1, 2, 3, 6\]"):
        scaling.num_kv_heads(6, 4)


@given(st.integers(1, 1000), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1), st.data())
def test_rates_stay_in_range(n: int, up: float, down: float, final: float, data: st.DataObject):
    step = data.draw(st.integers(0, n))
    scale = schedule.lr_scale(step, n, up, down, final)
    assert min(final, 1 / max(round(up * n), 1)) - 1e-9 <= scale <= 1 + 1e-9


def test_schedule_at_its_corners() -> None:
    assert schedule.lr_scale(0, 100, 0.1, 0.2, 0.0) == pytest.approx(0.1)
    assert schedule.lr_scale(9, 100, 0.1, 0.2, 0.0) == 1.0
    assert schedule.lr_scale(80, 100, 0.1, 0.2, 0.0) == 1.0
    assert schedule.lr_scale(90, 100, 0.1, 0.2, 0.1) == pytest.approx(0.55)
    assert schedule.lr_scale(100, 100, 0.1, 0.2, 0.1) == pytest.approx(0.1)
    assert schedule.muon_momentum(0) == 0.85
    assert schedule.muon_momentum(10_000) == 0.95
