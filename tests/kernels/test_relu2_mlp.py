"""The ReLU^2 network: what is saved and refused, tiles and layouts of the products, `auto`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanochat.kernels import launch
from nanochat.kernels.registry import select
from nanochat.kernels.relu2_mlp import (
    AUTO,
    reference,
    relu2_mlp,
    triton_fused,
    triton_pointwise,
    triton_tma,
)
from nanochat.kernels.relu2_mlp_kernels import activated_product, aligned

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = pytest.mark.parametrize("call", [triton_fused, triton_tma, triton_pointwise])
EVERY_WAY = pytest.mark.parametrize("how", ["pointer", "tma", "pointwise"])
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(rows: int = 20, width: int = 16) -> Inputs:
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=HERE, requires_grad=True)
    w_up = torch.randn(4 * width, width, device=HERE, requires_grad=True)
    w_down = torch.randn(width, 4 * width, device=HERE, requires_grad=True)
    return x, w_up, w_down


def saved_bytes(call: Callable[..., torch.Tensor]) -> int:
    """Bytes that autograd keeps besides the inputs."""
    arguments = inputs()
    given = {x.untyped_storage().data_ptr() for x in arguments}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = call(*arguments)
    assert y.shape == arguments[0].shape
    return sum(kept.values())


@pytest.mark.long
@ALL
def test_one_tensor_is_saved_where_the_reference_saves_two_or_three(call: Any) -> None:
    activation = 20 * 64 * 4
    assert saved_bytes(call) == activation
    assert saved_bytes(reference) >= 2 * activation


@ALL
def test_by_hand(call: Any) -> None:
    x, w_up, w_down = (
        torch.full((1, 1), v, device=HERE, requires_grad=True) for v in (2.0, 3.0, 5.0)
    )
    y = call(x, w_up, w_down)  # pre 6, post 36
    y.backward()
    assert y.item() == 180
    # dpost 5, dpre 5 * 2 * 6 = 60
    found = [0.0 if t.grad is None else t.grad.item() for t in (x, w_up, w_down)]
    assert found == pytest.approx([60 * 3, 60 * 2, 36])


@ALL
def test_one_token_without_a_batch(call: Any) -> None:
    x, w_up, w_down = inputs(rows=1)
    got, want = call(x[0], w_up, w_down), reference(x[0], w_up, w_down)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@ALL
def test_gradient_is_zero_where_nothing_passes(call: Any) -> None:
    x, w_up, w_down = inputs()
    with torch.no_grad():
        w_up.copy_(-w_up.abs())
    y = call(x.abs(), w_up, w_down)
    y.sum().backward()
    assert not y.any()
    assert w_up.grad is not None
    assert not w_up.grad.any()


@ALL
def test_nan_is_not_hidden_by_the_activation(call: Any) -> None:
    x, w_up, w_down = inputs()
    with torch.no_grad():
        x[3] = math.nan
    bad = call(x, w_up, w_down).isnan()
    assert bad[3].all()
    assert bad.sum() == bad[3].numel()


@ALL
def test_operands_that_do_not_fit_are_refused(call: Any) -> None:
    x, w_up, w_down = inputs()
    for wrong in (
        (x[:, 1:], w_up, w_down),
        (x, w_up, w_down.mT),
        (x, w_up[1:], w_down),
        (x, w_up.bfloat16(), w_down),
        (x.half(), w_up, w_down),
    ):
        with pytest.raises(ValueError, match=r"w_up \(F, D\) and w_down \(D, F\) of one dtype"):
            call(*wrong)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same matrix with a base and rows off every multiple of 16 bytes."""
    rows, width = x.shape
    memory = x.new_full((rows * (width + 3) + 1,), math.nan)
    return memory.as_strided((rows, width), (width + 3, 1), 1).copy_(x)


@pytest.mark.long
@EVERY_WAY
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (129, 65, 130), (300, 33, 140), (64, 64, 64)])
def test_products_cover_every_tile(how: str, M: int, K: int, N: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(M, K, device=HERE), torch.randn(N, K, device=HERE).mT
    post = torch.rand(M, N, device=HERE)
    forward, backward = (a @ b).relu().square(), (a @ b) * 2 * post.sqrt()
    for x, w in ((a, b), (misaligned(a), b.contiguous()), (a.mT.contiguous().mT, misaligned(b))):
        got = activated_product(x, w, None, how)
        torch.testing.assert_close(got, forward, rtol=1e-4, atol=1e-4)
        assert got.is_contiguous()
        for saved in (post, misaligned(post)):
            got = activated_product(x, w, saved, how)
            torch.testing.assert_close(got, backward, rtol=1e-4, atol=1e-4)


def test_only_what_tma_cannot_move_is_copied() -> None:
    x = torch.randn(6, 16, device=HERE)
    for readable in (x, x[:, :7], x[1:, 4:], x[::2]):
        assert aligned(readable) is readable
    for other in (
        x[:, 1:],
        x.mT,
        x[:1].expand(6, 16),
        misaligned(x),
        torch.randn(3, 5, device=HERE),
    ):
        copy = aligned(other)
        assert copy is not other
        assert torch.equal(copy, other)
        assert copy.data_ptr() % 16 == copy.stride(0) * copy.element_size() % 16 == 0


@pytest.mark.gpu
@EVERY_WAY
def test_products_beyond_two_to_the_31_elements(how: str) -> None:
    a = torch.randn(40_000, 16, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(16, 65_536, device="cuda", dtype=torch.bfloat16)
    post = activated_product(a, b, None, how)
    assert post.numel() > 2**31
    last = activated_product(a[-256:], b, None, how)
    assert torch.equal(post[-256:], last)
    dpre = activated_product(a, b, post, how)
    assert torch.equal(dpre[-256:], activated_product(a[-256:], b, last, how))


def test_the_table_names_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    entry = {"implementation": "triton", "origin": "1.03 times faster on a test"}
    monkeypatch.setattr(launch, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(launch, "table", lambda name, folder: {"relu2_mlp.auto": [entry]})
    assert relu2_mlp.implementations["triton"].auto(cuda, dtype) == ""
    against = relu2_mlp.implementations["triton_pointwise"].auto(cuda, dtype)
    assert against == "triton is preferred: 1.03 times faster on a test"


def test_shipped_tables_prefer_an_implementation_that_exists() -> None:
    for architecture in ("generic", "sm_90", "sm_120"):
        entry = AUTO.entries(architecture)[0]
        assert entry["implementation"] in relu2_mlp.implementations


def test_each_can_be_asked_for_by_name() -> None:
    try:
        for name in ("triton", "triton_tma", "triton_pointwise"):
            chosen = select(f"relu2_mlp={name}", HERE, torch.float32)
            assert {c.op: c.implementation for c in chosen}["relu2_mlp"] == name
    finally:
        for choice in select("reference", HERE, torch.float32):
            assert choice.implementation == "reference"
