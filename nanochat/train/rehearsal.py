"""A training step on the meta device: what it would allocate, counted without computing."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from nanochat.common import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.registry import operations
from nanochat.profiler.memory import MemoryReport, measure_memory
from nanochat.train.step import train_step

RATES = 0.2, 0.004, 0.02, 0.0  # of embedding, head and matrices, and the decay: nothing here learns


@contextlib.contextmanager
def using(kernels: Mapping[str, str]) -> Iterator[None]:
    """Within the block, operation -> implementation as given, whether or not it can run here."""
    ops = operations()
    before = {name: op.selected for name, op in ops.items()}
    try:
        for name, implementation in kernels.items():
            ops[name].use(implementation)
        yield
    finally:
        for name, implementation in before.items():
            ops[name].use(implementation)


def count_memory(
    config: GPTConfig,
    device_batch_size: int,
    kernels: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
    micro_batches: int = 2,
    grad_clip: float = 0.0,
    architecture: str = "sm_90",
) -> MemoryReport:
    """The memory of a training step on one device, exact for what PyTorch and the kernels ask for.

    kernels       operation -> implementation
    architecture  of the GPU whose kernel configurations count
    """
    meta = torch.device("meta")
    runtime = Runtime(meta, dtype, 0, 0, 1, 0, Path())
    model = GPT(config, dtype).to_empty(device=meta)
    optimizers = model.setup_optimizers(*RATES, distributed=False)
    ids = torch.empty(device_batch_size, config.sequence_len, dtype=torch.int64, device=meta)
    batches = [(ids, ids)] * micro_batches
    with using(kernels):
        return measure_memory(
            model,
            optimizers,
            lambda: train_step(model, optimizers, batches, runtime, grad_clip),
            architecture,
        )
