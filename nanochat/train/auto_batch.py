"""--device_batch_size=auto: the batch that the planner foresees to fit, tried before the run.

The tokens of an optimizer step stay what they are: a smaller batch accumulates more micro-batches.
"""

from dataclasses import replace
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from nanochat import scaling
from nanochat.common import Runtime, print0
from nanochat.gpt import GPT
from nanochat.kernels.launch import architecture_of
from nanochat.kernels.registry import Choice
from nanochat.profiler.activations import Setup
from nanochat.profiler.footprint import footprint
from nanochat.profiler.plan import GIB, HEADROOM, RESERVED_GIB, Run
from nanochat.settings import AUTO
from nanochat.train.run import choices_record
from nanochat.train.session import TrainingSettings

CPU_SHARE = 0.5  # of what is free: the page cache and other programs need the rest
SettingsT = TypeVar("SettingsT", bound=TrainingSettings)


def resolved(
    settings: SettingsT,
    tokens_per_step: int,
    model: GPT,
    trained: torch.nn.Module,
    runtime: Runtime,
    kernels: list[Choice],
) -> tuple[SettingsT, int]:
    """The settings with a number as device_batch_size, and the micro-batches of a step.

    Comes after the model and the optimizers are on the device: what is free then is for the rest.
    trained  the model, compiled or not
    Raises   ValueError if the batches do not divide a step.
    """
    if settings.device_batch_size == AUTO:
        setup = Setup(
            model.config,
            1,
            choices_record(kernels),
            world_size=runtime.world_size,
            itemsize=runtime.dtype.itemsize,
            architecture=architecture_of(runtime.device),
        )
        run = Run(setup, tokens_per_step, num_iterations=1)
        batch = tried(run, foreseen(run, runtime), trained, runtime)
        settings = replace(settings, device_batch_size=batch)
    length, batch = model.config.sequence_len, settings.device_batch_size
    return settings, scaling.accumulation_steps(tokens_per_step, batch, length, runtime.world_size)


def free_bytes(runtime: Runtime) -> float:
    """Bytes that one rank may still take: of its GPU, or its part of half the free main memory."""
    device = runtime.device
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached - RESERVED_GIB * GIB
    return CPU_SHARE * psutil.virtual_memory().available / runtime.world_size


def foreseen(run: Run, runtime: Runtime) -> int:
    """The largest batch whose forecast fits what is free on every rank; at least one sequence."""
    free = torch.tensor(free_bytes(runtime), dtype=torch.float32, device=runtime.device)
    free = runtime.all_reduce(free, dist.ReduceOp.MIN).item()
    held = HEADROOM * sum(footprint(run.setup).steady.values())
    batch = run.largest_batch(free + held) or 1
    more = next((size for size in run.batch_sizes() if size > batch), None)
    kind = "GPU" if runtime.device.type == "cuda" else "CPU, half of what is free"

    def beside_the_model(size: int) -> str:
        return f"{(HEADROOM * footprint(run.with_batch(size)).total - held) / GIB:.2f} GiB"

    why = "a whole step" if more is None else f"{more} would take {beside_the_model(more)}"
    print0(
        f"device_batch_size=auto: {batch} (forecast: {beside_the_model(batch)} of the "
        f"{free / GIB:.2f} GiB for this run on the {kind}; {why})"
    )
    return batch


def tried(run: Run, batch: int, trained: torch.nn.Module, runtime: Runtime) -> int:
    """`batch`, or the next smaller one if two micro-batches of it ran out of memory on any rank."""
    length = run.setup.model.sequence_len
    failed = False
    try:
        ids = torch.zeros(batch, length, dtype=torch.int64, device=runtime.device)
        for _ in range(2):  # the second beside the gradients of the first
            trained(ids, ids, loss_reduction="sum").backward()
    except torch.OutOfMemoryError:
        failed = True
    # only now, without the error and the frames that it holds, is the memory free again
    trained.zero_grad(set_to_none=True)
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    flag = torch.tensor(float(failed), device=runtime.device)
    smaller = [size for size in run.batch_sizes() if size < batch]
    if not runtime.all_reduce(flag, dist.ReduceOp.MAX).item() or not smaller:
        return batch
    accumulated = run.with_batch(smaller[-1]).micro_batches
    print0(
        f"device_batch_size=auto: {batch} ran out of memory; continuing with {smaller[-1]} and "
        f"{accumulated} micro-batches a step"
    )
    return smaller[-1]
