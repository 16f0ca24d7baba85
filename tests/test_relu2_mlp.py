"""The ReLU^2 network: what is saved, and how the tables choose between its implementations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanochat.kernels import launch
from nanochat.kernels.launch import preferred
from nanochat.kernels.registry import select
from nanochat.kernels.relu2_mlp import (
    reference,
    relu2_mlp,
    relu2_product,
    triton_fused,
    triton_pointwise,
)

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = pytest.mark.parametrize("call", [triton_fused, triton_pointwise])


def inputs(rows: int = 20, width: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((rows, width), (4 * width, width), (width, 4 * width))
    return tuple(torch.randn(shape, device=HERE, requires_grad=True) for shape in shapes)


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


@BOTH
def test_one_tensor_is_saved_where_the_reference_saves_two_or_three(call: Any) -> None:
    activation = 20 * 64 * 4
    assert saved_bytes(call) == activation
    assert saved_bytes(reference) >= 2 * activation


@BOTH
def test_gradient_is_zero_where_nothing_passes(call: Any) -> None:
    x, w_up, w_down = inputs()
    with torch.no_grad():
        w_up.copy_(-w_up.abs())
    y = call(x.abs(), w_up, w_down)
    y.sum().backward()
    assert not y.any()
    assert not w_up.grad.any()


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (129, 65, 130), (300, 33, 140), (64, 64, 64)])
def test_products_cover_every_tile(M: int, K: int, N: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(M, K, device=HERE), torch.randn(N, K, device=HERE)
    want = (a @ b.mT).relu().square()
    torch.testing.assert_close(relu2_product(a, b.mT, None), want, rtol=1e-4, atol=1e-4)
    post = torch.rand(M, N, device=HERE)
    want = (a @ b.mT) * 2 * post.sqrt()
    torch.testing.assert_close(relu2_product(a, b.mT, post), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        relu2_product(a, b.mT.contiguous(), post), want, rtol=1e-4, atol=1e-4
    )


def test_the_table_names_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    entry = {"implementation": "triton", "origin": "1.03 times faster on a test"}
    monkeypatch.setattr(launch, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(launch, "table", lambda name: {"relu2_mlp.auto": [entry]})
    assert preferred("relu2_mlp", "triton")(cuda, dtype) == ""
    against = preferred("relu2_mlp", "triton_pointwise")(cuda, dtype)
    assert against == "triton is preferred: 1.03 times faster on a test"


def test_shipped_tables_prefer_an_implementation_that_exists() -> None:
    for architecture in ("generic", "sm_90", "sm_120"):
        entry = launch.table(architecture)["relu2_mlp.auto"][0]
        assert entry["implementation"] in relu2_mlp.implementations


def test_both_can_be_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton_pointwise"):
        chosen = select(f"relu2_mlp={name}", HERE, torch.float32)
        assert {c.op: c.implementation for c in chosen}["relu2_mlp"] == name
    relu2_mlp.use("reference")
