"""Attention backends: what they are called with, when they are refused, what auto prefers."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from nanochat.kernels import attention as module
from nanochat.kernels.attention import FLASH_MODULES, attention, reference, sdpa, sdpa_order

CPU = torch.device("cpu")


def inputs(T: int = 9, S: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, T, 4, 8), torch.randn(2, S, 2, 8), torch.randn(2, S, 2, 8)


def test_sdpa_refuses_a_window_rather_than_mask_densely() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"window of 4 in 9 positions.*attention=flex"):
        sdpa(q, k, v, window=4)
    torch.testing.assert_close(sdpa(q, k, v, window=9), reference(q, k, v))
    lengths = torch.tensor([9, 7])
    got = sdpa(q[:, :2], k, v, 4, lengths)
    torch.testing.assert_close(got, reference(q[:, :2], k, v, 4, lengths))


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "CUDNN"), ((12, 0), "FLASH")])
def test_order_of_sdpa_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    order = sdpa_order(torch.device("cuda"))
    assert order[0] == getattr(SDPBackend, f"{first}_ATTENTION")
    assert order[-1] == SDPBackend.MATH


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """flash_attn_func packages that answer with the reference and remember their arguments."""
    calls: list[dict[str, Any]] = []

    def flash_attn_func(q: Any, k: Any, v: Any, **options: Any) -> Any:
        calls.append(options)
        left, right = options.get("window_size", (-1, -1))
        assert options["causal"]
        assert right in (0, -1)
        y = reference(q, k, v, None if left == -1 else left + 1)
        return (y, torch.zeros(1)) if len(calls) % 2 else y

    for name in FLASH_MODULES.values():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            fake = ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, fake.__name__, fake)
        vars(fake)["flash_attn_func"] = flash_attn_func
    return calls


@pytest.mark.parametrize("name", FLASH_MODULES)
def test_flash_packages_get_causal_and_the_window(name: str, package: list[dict[str, Any]]) -> None:
    q, k, v = inputs()
    call = attention.implementations[name].call
    for window in (None, 1, 4, 9):
        torch.testing.assert_close(call(q, k, v, window), reference(q, k, v, window))
    assert len(package) == 4


@pytest.mark.parametrize("name", [*FLASH_MODULES, "flex", "varlen"])
def test_a_cache_attends_through_sdpa(name: str, package: list[dict[str, Any]]) -> None:
    q, k, v = inputs(T=2)
    lengths = torch.tensor([9, 5])
    call = attention.implementations[name].call
    torch.testing.assert_close(call(q, k, v, 3, lengths), reference(q, k, v, 3, lengths))
    assert not package


def test_needs_say_what_is_missing() -> None:
    needs = attention.implementations["fa3"].needs
    cuda = torch.device("cuda")
    assert "needs a CUDA device" in needs(CPU, torch.bfloat16)
    assert "not torch.float32" in needs(cuda, torch.float32)
    assert "flash_attn_interface is not installed" in needs(cuda, torch.bfloat16)


def test_a_namespace_without_the_function_is_not_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", empty)
    needs = attention.implementations["fa3"].needs
    assert "has no flash_attn_func" in needs(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "want"), [((9, 0), {"sdpa", "fa3", "fa4"}), ((12, 0), {"sdpa"})]
)
def test_what_auto_may_choose(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], want: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    allowed = {
        name
        for name, implementation in attention.implementations.items()
        if not implementation.auto(cuda, torch.bfloat16)
    }
    assert allowed == want | {"reference"}
    # among those that run, the last one added is taken
    assert list(attention.implementations)[-3:] == ["sdpa", "fa4", "fa3"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex", "varlen", *FLASH_MODULES])
def test_windows_on_a_gpu(name: str) -> None:
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    refusal = attention.implementations[name].needs(cuda, dtype)
    if refusal:
        pytest.skip(refusal)
    q, k, v = (torch.randn(2, 300, heads, 128, device=cuda, dtype=dtype) for heads in (4, 2, 2))
    for window in (None, 1, 100):
        want = module.reference(q.double(), k.double(), v.double(), window)
        got = attention.implementations[name].call(q, k, v, window)
        assert (got - want).abs().max() < 0.05
