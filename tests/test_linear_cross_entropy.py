"""The chunked loss: chunks, options, memory, the gradients that wait for their scale."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.kernels import launch, linear_cross_entropy
from nanochat.kernels.linear_cross_entropy import (
    chunked,
    extra_bytes,
    reference,
    triton_chunked,
    triton_min_memory,
)

BOTH = pytest.mark.parametrize("call", [triton_chunked, triton_min_memory])
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda x: 3)


def inputs(N: int = 11, D: int = 24, V: int = 128) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    targets = torch.randint(100, (N,), device=HERE)
    targets[::4] = -1
    x, weight = torch.randn(N, D, device=HERE), torch.randn(V, D, device=HERE)
    return x.requires_grad_(), weight.requires_grad_(), targets


def results(call: Callable[..., torch.Tensor], scale: torch.Tensor, **options: Any) -> list[Any]:
    x, weight, targets = inputs()
    loss = call(x, weight, targets, 15.0, 100, **options)
    (loss * scale).sum().backward()
    return [loss, x.grad, weight.grad]


@BOTH
@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_chunks_add_up(call: Any, reduction: str, z_loss: float) -> None:
    scale = torch.linspace(-2, 3, 11, device=HERE) if reduction == "none" else torch.tensor(0.37)
    want = results(reference, scale, reduction=reduction, z_loss=z_loss)
    got = results(call, scale, reduction=reduction, z_loss=z_loss)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@BOTH
def test_shape_of_the_targets_is_kept(call: Any) -> None:
    x, weight, targets = inputs(12)
    x, targets = x.view(3, 4, -1), targets.view(3, 4)
    got = call(x, weight, targets, 15.0, 100, "none")
    torch.testing.assert_close(got, reference(x, weight, targets, 15.0, 100, "none"))
    assert got.shape == (3, 4)


@BOTH
def test_large_logits_stay_finite(call: Any) -> None:
    x, weight, targets = inputs()
    loss = call(1e4 * x, weight, targets, 15.0, 100)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


@BOTH
def test_no_valid_target_is_zero_and_moves_nothing(call: Any) -> None:
    x, weight, targets = inputs()
    loss = call(x, weight, torch.full_like(targets, -1), 15.0, 100)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


@BOTH
def test_padding_rows_of_the_head_get_no_gradient(call: Any) -> None:
    x, weight, targets = inputs()
    call(x, weight, targets, 15.0, 100).backward()
    assert not weight.grad[100:].any()
    assert weight.grad[:100].any()


def test_scale_of_the_gradient_is_not_rounded_to_sixteen_bits() -> None:
    """1 + 2^-8 would become 1 in bfloat16, and every gradient too short."""
    x, weight, targets = (t.detach() for t in inputs(64, 96))
    gradients = []
    for scale in (1.0, 1 + 2**-8):
        leaf = x.bfloat16().requires_grad_()
        loss = triton_chunked(leaf, weight.bfloat16(), targets, 15.0, 100, "sum")
        (loss * scale).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(gradients[1], (gradients[0].float() * (1 + 2**-8)).bfloat16())


def test_without_gradients_nothing_is_made_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = inputs()
    with torch.no_grad():
        losses, dx, dw = chunked(x, weight, targets, None, 15.0, 100, 0.0, False)
    assert losses.shape == (11,)
    assert dx.numel() == dw.numel() == 0
    made = []
    real = launch.launch
    monkeypatch.setattr(
        linear_cross_entropy,
        "launch",
        lambda *a, **k: (made.append(k["GRADIENTS"]), real(*a, **k)),
    )
    with torch.no_grad():
        triton_chunked(x, weight, targets, 15.0, 100)
    assert made == [False]


class PeakBytes(TorchDispatchMode):
    """Most bytes alive at once in storages that operations made."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.given:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_extra_memory_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    N, D, V, rows = 96, 8, 512, 16
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda x: rows)
    monkeypatch.setattr(linear_cross_entropy, "launch", lambda *a, **k: None)
    x, weight = torch.randn(N, D), torch.randn(V, D)
    targets = torch.randint(V, (N,))
    with PeakBytes(x, weight, targets) as peak:
        kept = chunked._init_fn(x, weight, targets, None, 15.0, V, 0.0, True)
    assert len(kept) == 3
    foreseen = extra_bytes(N, D, V, rows, 4)
    assert foreseen <= peak.peak <= 1.05 * foreseen
    # d20 with a vocabulary of 65,536, in bfloat16: 1.04 GB against 26 GB of eager logits
    assert extra_bytes(65_536, 1280, 65_536, 4096, 2) < 1.1e9


@pytest.mark.gpu
def test_extra_memory_on_a_gpu() -> None:
    N, D, V = 65_536, 1280, 65_536
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    triton_chunked(x, weight, targets).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.5e9
