"""AdamW and Muon on one process, against torch.optim and linear algebra."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from nanochat.kernels.adamw_step import adamw_step
from nanochat.kernels.newton_schulz import (
    MUON_COEFFICIENTS,
    POLAR_EXPRESS_COEFFICIENTS,
    newton_schulz,
)
from nanochat.optim.adamw import AdamW
from nanochat.optim.muon import Muon
from nanochat.optim.sharding import BucketOptimizer

# Polar Express, arXiv:2505.16932, five steps with a 2 % safety on the norm.
PUBLISHED_POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
VECTOR_SHAPES = ((7,), (3, 5), (2, 3, 4), (1,), ())
MATRIX_SHAPES = ((8, 8), (6, 16), (16, 6), (6, 16), (1, 5))


def parameters(shapes: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def assert_equal(ours: list[Parameter], theirs: list[Parameter], rtol: float, atol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("eps", "scale"), [(1e-8, 1.0), (1e-10, 1e-8)])
def test_adamw_equals_torch(weight_decay: float, eps: float, scale: float) -> None:
    ours, theirs = parameters(VECTOR_SHAPES), parameters(VECTOR_SHAPES)
    settings: dict[str, Any] = {
        "lr": 0.01, "betas": (0.8, 0.95), "eps": eps, "weight_decay": weight_decay,
    }  # fmt: skip
    optimizer, oracle = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(20):
        for params in (ours, theirs):
            set_gradients(params, step, scale)
        for each in (optimizer, oracle):
            each.param_groups[0]["lr"] = 0.01 * (1 - step / 40)
            each.step()
    assert_equal(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adamw_adds_eps_after_the_bias_correction() -> None:
    # First step, gradient g: m' = g and v' = g^2, so with eps = g the step is lr / 2 exactly. With
    # eps inside the correction it would be lr / (1 + 1 / sqrt(1 - b2)) = 0.18 lr.
    weight, gradient = torch.zeros(1), torch.full((1,), 1e-6)
    adamw_step.reference(
        weight, gradient, torch.zeros(1), torch.zeros(1), 1,
        lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0,
    )  # fmt: skip
    torch.testing.assert_close(weight, torch.tensor([-0.5]))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_equals_torch(weight_decay: float) -> None:
    ours, theirs = parameters(MATRIX_SHAPES), parameters(MATRIX_SHAPES)
    optimizer = Muon(ours, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    oracle = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=weight_decay,
        nesterov=True, adjust_lr_fn="original", ns_steps=5, eps=1e-7,
    )  # fmt: skip
    for step in range(10):
        for params in (ours, theirs):
            set_gradients(params, step)
        for each in (optimizer, oracle):
            each.param_groups[0]["momentum"] = 0.85 + 0.01 * step
            each.step()
    # An update has a root mean square near 0.02 / sqrt(6); bfloat16 leaves 1e-2 of it a step.
    assert_equal(ours, theirs, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("row_splits", [(6, 6, 6), (12, 4, 2)])
def test_row_splits_equal_separate_parameters(row_splits: tuple[int, ...]) -> None:
    packed = parameters([(18, 10), (18, 10)])
    separate = [Parameter(part.clone()) for p in packed for part in p.detach().split(row_splits)]
    fused = Muon([{"params": packed, "row_splits": row_splits}], weight_decay=0.1)
    apart = Muon(separate, weight_decay=0.1)
    for step in range(3):
        set_gradients(packed, step)
        gradients = [
            part for p in packed if p.grad is not None for part in p.grad.split(row_splits)
        ]
        for param, gradient in zip(separate, gradients, strict=True):
            param.grad = gradient.clone()
        fused.step()
        apart.step()
    torch.testing.assert_close(
        torch.cat([p.detach() for p in packed]),
        torch.cat([p.detach() for p in separate]),
        rtol=0.0,
        atol=0.0,
    )


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_polar_express_singular_values_are_near_one(shape: tuple[int, int, int]) -> None:
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    values = torch.logspace(0, -2, min(shape[1:]), dtype=G.dtype)  # condition number 100
    G = (U * values) @ Vh
    # The published polynomials on the singular values themselves, the norm raised by 2 %.
    values = values / (1.02 * torch.linalg.vector_norm(values))
    for a, b, c in PUBLISHED_POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    exact = newton_schulz(G, POLAR_EXPRESS_COEFFICIENTS, torch.float64)
    torch.testing.assert_close(exact, (U * values) @ Vh, rtol=1e-5, atol=1e-5)
    rounded = torch.linalg.svdvals(newton_schulz(G, POLAR_EXPRESS_COEFFICIENTS))
    assert rounded.min() > 0.84
    assert rounded.max() < 1.16


def test_muon_coefficients_bring_singular_values_into_their_band() -> None:
    G = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(G, MUON_COEFFICIENTS))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("coefficients", [MUON_COEFFICIENTS, POLAR_EXPRESS_COEFFICIENTS])
def test_newton_schulz_of_a_tall_matrix_is_the_wide_one_transposed(coefficients: Any) -> None:
    G = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    wide, tall = newton_schulz(G, coefficients), newton_schulz(G.mT.contiguous(), coefficients)
    assert tall.dtype == G.dtype
    torch.testing.assert_close(tall, wide.mT, rtol=0.0, atol=0.02)
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 5), coefficients), torch.zeros(1, 3, 5))


def test_polar_express_is_chosen_by_name() -> None:
    first, second = parameters([(16, 16)]), parameters([(16, 16)])
    for params, name in ((first, "muon"), (second, "polar_express")):
        set_gradients(params, 0)
        Muon(params, lr=1.0, coefficients=name).step()
    update = (parameters([(16, 16)])[0] - second[0]).detach()
    values = torch.linalg.svdvals(update)
    assert 0.84 < values.min() < values.max() < 1.16
    assert not torch.allclose(first[0], second[0], atol=0.05)
    with pytest.raises(ValueError, match="polar_express"):
        Muon(first, coefficients="newton")


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Parameter], BucketOptimizer]:
    params = parameters(MATRIX_SHAPES, dtype=dtype)
    if name == "muon":
        return params, Muon(params, weight_decay=0.1)
    return params, AdamW(params, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip_is_bitwise(name: str, dtype: torch.dtype) -> None:
    params, optimizer = make(name, dtype)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, fresh = make(name, dtype)
    for target, source in zip(resumed, params, strict=True):
        target.data.copy_(source)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.param_groups[0]["lr"] == 0.05
    tensors = [v for b in fresh.buckets for v in b.state.values() if isinstance(v, Tensor)]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    for step in range(3, 6):
        for each, owner in ((params, optimizer), (resumed, fresh)):
            set_gradients(each, step)
            owner.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_of_another_model_is_refused(name: str) -> None:
    _, optimizer = make(name)
    other = parameters([(4, 4)])
    foreign = Muon(other) if name == "muon" else AdamW(other)
    with pytest.raises(ValueError, match="number of ranks"):
        optimizer.load_state_dict(foreign.state_dict())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameter_without_gradient_is_left_alone_as_torch_does(name: str) -> None:
    params, optimizer = make(name)
    others = parameters(MATRIX_SHAPES)
    oracle: torch.optim.Optimizer = (
        torch.optim.Muon(others, lr=0.02, momentum=0.95, weight_decay=0.1)
        if name == "muon"
        else torch.optim.AdamW(others, lr=0.1, weight_decay=0.1)
    )
    # (6, 16) twice, so one of a stack is missing; (8, 8) is missing alone.
    for step, missing in enumerate(((), (0, 1), (3,), (3,), (3,), ())):
        for group in (optimizer.param_groups[0], oracle.param_groups[0]):
            if name == "muon":
                group["momentum"] = 0.5  # so that three steps of wrong decay would show
        for each in (params, others):
            set_gradients(each, step)
            for index in missing:
                each[index].grad = None
        before = [params[index].detach().clone() for index in missing]
        optimizer.step()
        oracle.step()
        assert all(torch.equal(params[i], b) for i, b in zip(missing, before, strict=True))
    assert_equal(params, others, rtol=1e-6, atol=1e-6 if name == "adamw" else 5e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_clipping_by_the_global_norm_equals_torch(name: str, as_tensor: bool) -> None:
    params, optimizer = make(name)
    clipped, other = make(name)
    for each in (params, clipped):
        set_gradients(each, 0, scale=3.0)
    norm = torch.nn.utils.clip_grad_norm_(clipped, 1.0)
    other.step()
    ours = optimizer.gradient_square_sum().sqrt()
    torch.testing.assert_close(ours, norm)
    scale = 1.0 / (ours + 1e-6)
    optimizer.step(scale if as_tensor else scale.item())
    assert_equal(params, clipped, rtol=1e-5, atol=1e-6 if name == "adamw" else 5e-4)


def test_gradients_are_read_again_after_a_step_and_after_zero_grad() -> None:
    params, optimizer = make("adamw")
    set_gradients(params, 0)
    first = optimizer.gradient_square_sum()
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    assert optimizer.gradient_square_sum() == 0
    optimizer.zero_grad()
    set_gradients(params, 0)
    assert optimizer.gradient_square_sum() == first
    optimizer.step()
    set_gradients(params, 0, scale=2.0)
    torch.testing.assert_close(optimizer.gradient_square_sum(), 4 * first)


def test_groups_carry_rates_that_a_torch_scheduler_drives() -> None:
    params = parameters(VECTOR_SHAPES)
    optimizer = AdamW([{"params": params[:2], "lr": 0.2}, {"params": params[2:]}], lr=0.004)
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.2, 0.004]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = [param.detach().clone() for param in params]
    set_gradients(params, 0)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.002]
    # The first step of Adam has the size of the rate, whatever the gradient.
    for index, rate in enumerate((0.2, 0.2, 0.004, 0.004, 0.004)):
        moved = (params[index].detach() - before[index]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "row_splits", "message"),
    [((5,), None, "AdamW"), ((6, 4), (4, 4), "row_splits"), ((6, 4), (6, 0), "row_splits")],
)
def test_muon_refuses_what_is_not_a_stack_of_matrices(
    shape: tuple[int, ...], row_splits: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": parameters([shape]), "row_splits": row_splits}])


def test_parameters_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        AdamW([Parameter(torch.zeros(3, 4).T)])
