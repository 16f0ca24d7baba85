"""What operations say they cost, against what their kernels load and store, and torch's FLOPs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nanochat.kernels import attention
from nanochat.kernels.optional_triton import is_interpreting, triton
from nanochat.kernels.registry import operations
from nanochat.kernels.workloads import Workload

CPU = torch.device("cpu")
TINY = Workload("tiny", layers=2, width=256, tokens=64, vocab_size=512, kv_heads=1)
# whose kernels do all of the work: the products of the others are PyTorch's
ONE_PASS = ("rms_norm", "add_rms_norm", "norm_rope", "qk_norm_rope", "adamw_step")


@contextmanager
def bytes_of_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each kind that interpreted kernels load and store: every address once each way."""
    moved = [0]
    builder: Any = triton.runtime.interpreter.InterpreterBuilder
    touched: dict[str, list[np.ndarray]] = {"load": [], "store": []}
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        touched[kind].append(np.add.outer(addresses, np.arange(size, dtype=np.uint64)).ravel())

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        note("load", ptrs, mask)
        return load(self, ptrs, mask, *args)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        note("store", ptrs, mask)
        return store(self, ptrs, value, mask, *args)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", create_masked_load)
        patch.setattr(builder, "create_masked_store", create_masked_store)
        yield moved
    moved[0] = sum(len(np.unique(np.concatenate(parts))) for parts in touched.values() if parts)


def leaves(arguments: tuple[Any, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [x for x in arguments if isinstance(x, torch.Tensor) and x.dtype == dtype]


@pytest.mark.skipif(not is_interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_the_kernels_move(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    op = operations()[name]
    arguments = op.workload(TINY, CPU, dtype)
    cost = op.cost(*arguments)
    for x in leaves(arguments, dtype) if cost.backward else []:
        x.requires_grad_(x.dim() > 2 or name.endswith("rms_norm"))  # tables stay constant
    with bytes_of_kernels(monkeypatch) as forward:
        outputs = op.implementations["triton"].call(*arguments)
    assert forward[0] == cost.bytes
    if cost.backward:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.randn_like(y) for y in outputs]
        with bytes_of_kernels(monkeypatch) as backward:
            torch.autograd.backward(outputs, gradients)
        assert backward[0] == cost.backward.bytes


def test_every_differentiable_operation_has_a_backward_cost() -> None:
    for op in operations().values():
        assert (op.cost(*op.workload(TINY, CPU, torch.float32)).backward is None) == (
            op.name in ("adamw_step", "newton_schulz")
        ), op.name


@pytest.mark.parametrize("name", ["relu2_mlp", "linear_cross_entropy", "newton_schulz"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    op = operations()[name]
    arguments = op.workload(TINY, CPU, torch.float32)
    passes = op.cost(*arguments).passes()
    for x in leaves(arguments, torch.float32) if "both" in passes else []:
        x.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        outputs = op.reference(*arguments)
    assert forward.get_total_flops() == passes["forward"].flops
    if "both" in passes:
        with FlopCounterMode(display=False) as backward:
            outputs.sum().backward()
        assert backward.get_total_flops() == passes["backward"].flops


def test_flops_of_attention_are_those_of_its_visible_pairs() -> None:
    """torch counts all T * T pairs, a causal model looks at T (T + 1) / 2 of them."""
    T = 16
    q = torch.empty(2, T, 4, 32)
    passes = attention.cost(q, q, q).passes()
    shape = (2, 4, T, 32)
    share = (T + 1) / (2 * T)
    assert passes["forward"].flops == share * sdpa_flop_count(shape, shape, shape)
    assert passes["backward"].flops == share * sdpa_backward_flop_count(shape, shape, shape, shape)


def test_cost_of_both_passes_is_their_sum() -> None:
    (x,) = operations()["rms_norm"].workload(TINY, CPU, torch.float32)
    passes = operations()["rms_norm"].cost(x).passes()
    assert passes["both"].bytes == 5 * 4 * x.numel()
    assert passes["both"].flops == passes["forward"].flops + passes["backward"].flops
