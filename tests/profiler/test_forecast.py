"""Time by arithmetic: work against PyTorch's own counts, times against what physics allows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanochat import hardware
from nanochat.gpt import GPT
from nanochat.kernels.launch import recording
from nanochat.kernels.newton_schulz import MUON_COEFFICIENTS
from nanochat.kernels.registry import operations
from nanochat.profiler.activations import SAVES, Setup
from nanochat.profiler.footprint import buckets
from nanochat.profiler.forecast import (
    ASSUMPTIONS,
    TRAFFIC,
    newton_schulz_flops,
    step_time,
    work,
)
from nanochat.profiler.memory import AsOnGPU, tensors_of
from nanochat.train.rehearsal import using
from nanochat.train.run import model_config
from tests.profiler.test_footprint import FUSED, REFERENCE

RATED = [gpu for gpu in hardware.GPUS if gpu.bf16_flops]
META = torch.device("meta")
H200, H100 = (hardware.lookup(name) for name in ("H200", "H100"))
assert H200 is not None
assert H100 is not None


class Count(TorchDispatchMode):
    """Operations that start a kernel, and the bytes that those other than products move."""

    launches = bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = tensors_of((args, kwargs)), tensors_of(result)
        storages = {x.untyped_storage()._cdata for x in given}
        view = made and all(x.untyped_storage()._cdata in storages for x in made)
        name = func.name()
        if (view and not func._schema.is_mutable) or "empty" in name or "detach" in name:
            return result
        self.launches += 1
        if "mm" not in name:
            self.bytes += sum(x.nbytes for x in (*given, *made))
        return result


def micro_batch(depth: int, kernels: dict[str, str]) -> Callable[[], object]:
    """Forward and backward of 2 x 256 tokens, with gradients of an earlier micro-batch."""
    model = GPT(model_config(depth, -1, 256, 8192), torch.bfloat16).to_empty(device=META)
    ids = torch.empty(2, 256, dtype=torch.int64, device=META)

    def run() -> None:
        with using(kernels), AsOnGPU(), recording("sm_90"):
            model(ids, ids).backward()

    run()
    return run


def test_flops_are_those_that_pytorch_counts() -> None:
    run = micro_batch(3, REFERENCE)
    with FlopCounterMode(display=False) as counted:
        run()
    w = work(Setup(model_config(3, -1, 256, 8192), 2, REFERENCE))
    assert counted.get_total_flops() == w.products + w.attention


@pytest.mark.parametrize("n_kv_head", [-1, 1])
def test_newton_schulz_flops_are_those_that_pytorch_counts(n_kv_head: int) -> None:
    config = model_config(4, n_kv_head, 256, 8192)
    with FlopCounterMode(display=False) as counted:
        for bucket in buckets(config):
            stack = torch.empty(bucket.count, bucket.rows, bucket.columns, device=META)
            operations()["newton_schulz"].reference(stack, MUON_COEFFICIENTS)
    assert counted.get_total_flops() == newton_schulz_flops(Setup(config, 1, REFERENCE))
    kernels = [newton_schulz_flops(Setup(config, 1, {"newton_schulz": way})) for way in
               ("triton_gram", "triton", "reference")]  # fmt: skip
    assert kernels == sorted(kernels)


def test_traffic_of_the_references_is_what_they_move() -> None:
    """Forward and backward on the meta device; PyTorch reads and writes each operand once."""
    B, T, H, C, V = 8, 512, 8, 1024, 8192
    setup = Setup(model_config(16, -1, T, V), B, REFERENCE)
    assert (setup.model.n_head, setup.model.n_embd) == (H, C)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=True)

    tables = (torch.empty(T, 64, device=META),) * 2
    targets = torch.empty(B, T, dtype=torch.int64, device=META)
    head = (tensor(V, C), targets, 15.0, V, "sum")
    calls = {
        "qk_norm_rope": (tensor(B, T, 3 * C), *tables, H, H),
        "attention": tuple(tensor(B, T, H, 128) for _ in range(3)),
        "relu2_mlp": (tensor(B, T, C), tensor(4 * C, C), tensor(C, 4 * C)),
        "linear_cross_entropy": (tensor(B, T, C), *head),
    }
    for op, arguments in calls.items():
        with AsOnGPU(), Count() as counted:
            outputs = operations()[op].reference(*arguments)
            outputs = [x for x in tensors_of(outputs) if x.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
        if op == "qk_norm_rope":  # the norm that stands for a GPU's: two passes and three, float32
            counted.bytes += 5 * 4 * B * T * 2 * H * 128
        layers = 1 if op == "linear_cross_entropy" else 16
        foreseen = TRAFFIC[op]["reference"](setup) / layers
        assert counted.bytes == pytest.approx(foreseen, rel=0.05), op


@pytest.mark.parametrize("kernels", [FUSED, REFERENCE], ids=["fused", "reference"])
def test_launches(kernels: dict[str, str]) -> None:
    run = micro_batch(4, kernels)
    with Count() as counted:
        run()
    foreseen = work(Setup(model_config(4, -1, 256, 8192), 2, kernels)).launches
    assert foreseen == pytest.approx(counted.launches, rel=0.05)


def test_traffic_is_known_of_every_kernel() -> None:
    assert set(TRAFFIC) == set(SAVES)
    for op, ways in TRAFFIC.items():
        # attention's kernels move no more than its FLOPs take
        missing = set(SAVES[op]) - set(ways)
        assert missing == (set(SAVES[op]) - {"reference"} if op == "attention" else set()), op


@given(
    st.integers(1, 30), st.integers(1, 64), st.sampled_from([1, 2, 8]), st.integers(1, 16),
    st.sampled_from([FUSED, REFERENCE]), st.sampled_from(RATED),
)  # fmt: skip
def test_no_forecast_beats_the_datasheet(depth, batch, ranks, micro_batches, kernels, gpu) -> None:
    s = Setup(model_config(depth, -1, 512, 8192), batch, kernels, micro_batches, ranks)
    slow, fast = step_time(s, gpu, "slow"), step_time(s, gpu, "fast")
    w = work(s)
    assert 0 < fast.total < slow.total
    assert all(0 <= vars(fast)[part] <= vars(slow)[part] * 1.0001 for part in vars(fast)
               if part != "waiting_for_launches")  # fmt: skip
    assert fast.total > micro_batches * (w.products + w.attention) / gpu.bf16_flops
    assert fast.total > micro_batches * w.traffic / gpu.memory_bytes_per_s
    assert (fast.communication > 0) == (ranks > 1)


def test_the_range_holds_a_published_run() -> None:
    """nanochat's d24 on 8 H100: 4.33e19 FLOPs in 10,949 s, 50 % MFU (its dev/LEADERBOARD.md)."""
    s = Setup(model_config(24, -1, 2048, 65_536), 16, FUSED, 2, 8)
    flops = (work(s).products + work(s).attention) * s.micro_batches / H100.bf16_flops
    assert (
        flops / step_time(s, H100, "slow").total < 0.50 < flops / step_time(s, H100, "fast").total
    )


def test_small_models_wait_for_the_host() -> None:
    def waiting(batch: int) -> float:
        setup = Setup(model_config(4, -1, 256, 8192), batch, REFERENCE)
        return step_time(setup, H200, "slow").waiting_for_launches

    assert waiting(1) > 0 == waiting(256)


def test_no_rate_no_times() -> None:
    gb10 = hardware.lookup("GB10")
    assert gb10 is not None
    with pytest.raises(ValueError, match="GB10: its times are not known; measure"):
        step_time(Setup(model_config(4, -1, 256, 8192), 1, FUSED), gb10, "slow")


def test_assumptions_are_shares_with_a_slow_and_a_fast_end() -> None:
    for name, (span, text) in ASSUMPTIONS.items():
        assert text
        if name == "launch":
            assert span.slow > span.fast > 0
        else:
            assert 0 < span.slow < span.fast < 1
