"""DistAdamW and DistMuon on 2 and 3 gloo ranks, against one process with the averaged gradient."""

import copy
import io
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import Parameter

from nanochat.common import Runtime, StoppedError
from nanochat.optim.adamw import AdamW, DistAdamW
from nanochat.optim.muon import DistMuon, Muon
from nanochat.optim.sharding import BucketOptimizer, all_gather, reduce_scatter_mean
from nanochat.train.step import train_step

pytestmark = pytest.mark.long

STEPS = 4
# Nothing divides: odd sizes, a scalar, one element, one parameter too large to share a bucket.
ADAMW_SHAPES = ((7,), (3, 5), (), (1,), (257, 257), (11,))
# One matrix of a shape (fewer than ranks), two, five, tall ones; then packed ones of GQA's form.
MUON_SHAPES = ((5, 9), (9, 5), (6, 6), (6, 6), *((4, 7),) * 5)
PACKED_SHAPES, ROW_SPLITS = ((12, 8),) * 2, (8, 2, 2)


def make_parameters(shapes: Any) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients_of(params: list[Parameter], step: int, rank: int) -> list[torch.Tensor]:
    """Multiples of 1/16: their sum over ranks is exact, whatever the order."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randint(-64, 65, p.shape, generator=generator) / 16.0 for p in params]


def build(
    classes: tuple[Any, Any], compute_dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Parameter], list[BucketOptimizer]]:
    adamw_class, muon_class = classes
    vectors, matrices = make_parameters(ADAMW_SHAPES), make_parameters(MUON_SHAPES)
    packed = make_parameters(PACKED_SHAPES)
    adamw_groups = [{"params": vectors[:3], "lr": 0.1}, {"params": vectors[3:], "eps": 0.5}]
    muon_groups = [{"params": matrices}, {"params": packed, "row_splits": ROW_SPLITS, "lr": 0.05}]
    optimizers = [
        adamw_class(adamw_groups, lr=0.01, weight_decay=0.1),
        muon_class(muon_groups, weight_decay=0.1, compute_dtype=compute_dtype),
    ]
    return [*vectors, *matrices, *packed], optimizers


def set_rates(optimizers: list[BucketOptimizer], step: int) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - 0.1 * step)
            if "momentum" in group:
                group["momentum"] = 0.85 + 0.02 * step


def check_collectives(rank: int, world_size: int) -> None:
    whole = torch.arange(world_size * 6.0).view(world_size * 2, 3)
    shard, wait = reduce_scatter_mean(whole + rank)
    wait()
    expected = whole + (world_size - 1) / 2
    torch.testing.assert_close(shard, expected[2 * rank : 2 * rank + 2])
    output = torch.full_like(whole, torch.nan)
    all_gather(shard, output)()
    torch.testing.assert_close(output, expected)


def check_training(rank: int, world_size: int, clip: float) -> None:
    """Distributed steps with this rank's gradient = single-process steps with the average."""
    # Clipping rounds the gradient in another order, which Newton-Schulz in bfloat16 would amplify.
    compute_dtype = torch.float32 if clip == 1.0 else torch.bfloat16
    params, optimizers = build((DistAdamW, DistMuon), compute_dtype)
    oracle_params, oracles = build((AdamW, Muon), compute_dtype)
    for step in range(STEPS):
        every = [gradients_of(params, step, r) for r in range(world_size)]
        for index, (param, oracle) in enumerate(zip(params, oracle_params, strict=True)):
            param.grad = every[rank][index]
            oracle.grad = sum((g[index] for g in every), torch.zeros(())) / world_size
        if step == 2:  # ranks disagree on who has a gradient: missing counts as zero
            if rank == 0:
                params[0].grad = None
            oracle_params[0].grad = sum((g[0] for g in every[1:]), torch.zeros(())) / world_size
        square_sum = torch.stack([o.gradient_square_sum() for o in optimizers]).sum()
        dist.all_reduce(square_sum)
        norm = torch.nn.utils.clip_grad_norm_(oracle_params, clip)
        # torch sums 66,049 squares in float32 one after the other: 2e-5 off on one thread.
        torch.testing.assert_close(square_sum.sqrt(), norm, rtol=5e-5, atol=0.0)
        scale = (clip / (square_sum.sqrt() + 1e-6)).clamp(max=1.0)
        assert (scale < 1) == (clip == 1.0)
        for each in (optimizers, oracles):
            set_rates(each, step)
        for optimizer, oracle in zip(optimizers, oracles, strict=True):
            optimizer.step(scale)
            oracle.step()
            optimizer.zero_grad()
    for index, (param, oracle) in enumerate(zip(params, oracle_params, strict=True)):
        where = f"parameter {index} on rank {rank} of {world_size}"
        assert torch.allclose(param, oracle, rtol=1e-5, atol=1e-5), where


def check_state(rank: int, world_size: int) -> None:
    """Saved and loaded shards continue bit for bit; the shard of another rank count is refused."""
    params, optimizers = build((DistAdamW, DistMuon))
    resumed_params, resumed = build((DistAdamW, DistMuon))

    def run(params: list[Parameter], optimizers: list[BucketOptimizer], step: int) -> None:
        for param, gradient in zip(params, gradients_of(params, step, rank), strict=True):
            param.grad = gradient
        for optimizer in optimizers:
            optimizer.step()

    run(params, optimizers, 0)
    for target, source in zip(resumed_params, params, strict=True):
        target.data.copy_(source)
    for target, source in zip(resumed, optimizers, strict=True):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
    run(params, optimizers, 1)
    run(resumed_params, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    _, singles = build((AdamW, Muon))
    for optimizer, single in zip(optimizers, singles, strict=True):
        with pytest.raises(ValueError, match="number of ranks"):
            optimizer.load_state_dict(copy.deepcopy(single.state_dict()))
    owned = sum(b.state["momentum_buffer"].numel() for b in optimizers[1].buckets)
    total = sum(b.state["momentum_buffer"].numel() for b in singles[1].buckets)
    assert owned < total


def check_steps_that_fail(rank: int, world_size: int) -> None:
    """What one rank meets leaves the weights and the state of every rank as they were."""
    model = torch.nn.Linear(4, 3)
    torch.nn.init.ones_(model.weight)
    weights = [model.weight, model.bias]
    optimizers = [DistAdamW([model.bias]), DistMuon([model.weight])]
    cpu, stop = torch.device("cpu"), SimpleNamespace(number=0)
    runtime = Runtime(cpu, torch.float32, rank, rank, world_size, 0, Path(), stop)  # pyright: ignore[reportArgumentType]
    batches = [(torch.full((2, 4), rank + 1.0), torch.zeros(2, dtype=torch.int64))] * 2
    problem = ""

    def loss_sum(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss = model(batch[0]).square().sum()
        if rank == 1 and problem == "memory":
            raise torch.OutOfMemoryError("none left")
        return loss * torch.nan if rank == 1 and problem == "nan" else loss

    def step() -> Any:
        return train_step(model, optimizers, batches, runtime, loss_sum=loss_sum)

    def everything() -> list[Any]:
        states = [b.state for optimizer in optimizers for b in optimizer.buckets]
        return copy.deepcopy([*weights, *states])

    assert step().finite
    before = everything()
    problem = "nan"
    assert not step().finite
    problem = "memory"
    with pytest.raises(torch.OutOfMemoryError, match=f"on 1 of {world_size} ranks"):
        step()
    problem = ""
    stop.number = 15 if rank == 0 else 0
    with pytest.raises(StoppedError):
        step()
    with pytest.raises(StoppedError):
        runtime.sum_over_ranks(1, lambda: runtime.check_stop() or torch.ones(1))
    stop.number = 0
    assert str(everything()) == str(before)
    assert step().finite
    assert str(everything()) != str(before)
    assert runtime.sum_over_ranks(2, lambda: torch.tensor([1.0, rank])) == [
        world_size, world_size * (world_size - 1) / 2
    ]  # fmt: skip


def worker(rank: int, ports: dict[int, int]) -> None:
    """The same processes as 3 ranks, then as 2: importing torch is what takes the time."""
    torch.set_num_threads(1)
    for world_size, port in ports.items():
        if rank < world_size:
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
            check_collectives(rank, world_size)
            check_training(rank, world_size, clip=1e6)
            check_training(rank, world_size, clip=1.0)
            check_state(rank, world_size)
            check_steps_that_fail(rank, world_size)
            dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_ranks_equal_one_process() -> None:
    mp.spawn(worker, ({3: free_port(), 2: free_port()},), nprocs=3)


@pytest.mark.parametrize("optimizer_class", [DistAdamW, DistMuon])
def test_without_a_process_group_the_error_names_the_remedy(optimizer_class: Any) -> None:
    with pytest.raises(ValueError, match="torchrun"):
        optimizer_class(make_parameters([(4, 4)]))
