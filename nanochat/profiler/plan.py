"""A training run foreseen: which batch fits a GPU, how long the run takes, what it costs.

Everything is a forecast: memory by `footprint`, time by `forecast`, with their assumptions. What
allocator and libraries take beside the tensors is `HEADROOM` and `RESERVED_GIB`, not measured.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanochat import scaling
from nanochat.hardware import Hardware
from nanochat.kernels.launch import recording
from nanochat.kernels.registry import choose
from nanochat.profiler.activations import Setup
from nanochat.profiler.footprint import Footprint, footprint
from nanochat.profiler.forecast import ASSUMPTIONS, Span, StepTime, step_time

GIB = 2**30
DRIVER_SHARE = 0.02  # of the memory as sold; the driver reports that much less
RESERVED_GIB = 1.0  # the context, cuBLAS's workspace, NCCL's buffers
HEADROOM = 1.05  # the allocator rounds up and cannot use every gap


@dataclass(frozen=True)
class Run:
    """What is to be trained, whatever on.

    setup     of one device; its batch and micro-batches are still to be chosen
    total_batch_size  tokens of one optimizer step over all devices
    num_iterations    optimizer steps
    """

    setup: Setup
    total_batch_size: int
    num_iterations: int

    @property
    def flops_per_token(self) -> tuple[int, int]:
        """Training FLOPs of a token: causal half, and nanochat's formula."""
        m, count = self.setup.model, self.setup.parameters
        sizes = m.n_layer, m.n_embd, m.sequence_len
        causal = scaling.flops_per_token(count, *sizes, causal=True)
        return causal, scaling.flops_per_token(count, *sizes, causal=False)

    def batch_sizes(self) -> list[int]:
        """Every device_batch_size that divides a step, the smallest first.

        Raises  ValueError if a step is not a whole number of sequences on every device.
        """
        length, ranks = self.setup.model.sequence_len, self.setup.world_size
        sequences = scaling.accumulation_steps(self.total_batch_size, 1, length, ranks)
        return [b for b in range(1, sequences + 1) if sequences % b == 0]

    def with_batch(self, device_batch_size: int) -> Setup:
        """The setup with a batch size, and as many micro-batches as that takes.

        Raises  ValueError if they do not divide a step.
        """
        s = self.setup
        steps = scaling.accumulation_steps(
            self.total_batch_size, device_batch_size, s.model.sequence_len, s.world_size
        )
        return replace(s, device_batch_size=device_batch_size, micro_batches=steps)

    def largest_batch(self, usable_bytes: float) -> int | None:
        """The largest batch size whose forecast fits; None where not even one sequence does."""
        fitting = None
        for batch in self.batch_sizes():
            if footprint(self.with_batch(batch)).total * HEADROOM > usable_bytes:
                break  # more sequences need more
            fitting = batch
        return fitting


@dataclass(frozen=True)
class Plan:
    """A run on GPUs of one model.

    setup   with the batch that was asked for, or else the largest that fits, or else one sequence
    usable  bytes of each GPU for tensors
    slow, fast  seconds of a step at both ends of the assumptions; None: the GPU's rate is unknown
    """

    run: Run
    gpu: Hardware
    setup: Setup
    memory: Footprint
    usable: float
    slow: StepTime | None
    fast: StepTime | None

    @property
    def fits(self) -> bool:
        """Whether the peak, with room for the allocator, is within the memory."""
        return self.memory.total * HEADROOM <= self.usable

    def _span(self, of: Callable[[float], float]) -> Span | None:
        if self.slow is None or self.fast is None or not self.fits:
            return None
        return Span(of(self.slow.total), of(self.fast.total))

    @property
    def tokens_per_second(self) -> Span | None:
        """Of all devices together."""
        return self._span(lambda seconds: self.run.total_batch_size / seconds)

    @property
    def mfu(self) -> Span | None:
        """Share of the datasheet's rate that the model's own FLOPs are, causal half."""
        peak = (self.gpu.bf16_flops or 0) * self.setup.world_size
        flops = self.run.flops_per_token[0] * self.run.total_batch_size
        return self._span(lambda seconds: flops / seconds / peak)

    @property
    def hours(self) -> Span | None:
        """Of every step; evaluations, checkpoints and the start come on top."""
        return self._span(lambda seconds: self.run.num_iterations * seconds / 3600)

    def dollars(self, per_hour: float | None = None) -> Span | None:
        """Of all GPUs; `per_hour` is the price of one, in place of the table's range."""
        price = self.gpu.rental if per_hour is None else (per_hour, per_hour)
        if self.hours is None or price is None:
            return None
        dearest, cheapest = price[1], price[0]
        ranks = self.setup.world_size
        return Span(self.hours.slow * ranks * dearest, self.hours.fast * ranks * cheapest)

    def record(self, per_hour: float | None = None) -> dict[str, Any]:
        """The plan as plain values; what is a range as [slow, fast], None where it is unknown."""
        setup, run = self.setup, self.run
        times = (self.slow, self.fast)
        spans = {
            "step_seconds": self._span(lambda seconds: seconds),
            "tokens_per_second": self.tokens_per_second,
            "mfu_causal": self.mfu,
            "hours": self.hours,
            "dollars": self.dollars(per_hour),
        }
        return {
            "kind": "forecast",
            "gpu": self.gpu.name,
            "num_gpus": setup.world_size,
            "depth": setup.model.n_layer,
            "parameters": asdict(setup.parameters) | {"total": setup.parameters.total},
            "flops_per_token_causal": run.flops_per_token[0],
            "flops_per_token_nanochat": run.flops_per_token[1],
            "num_iterations": run.num_iterations,
            "total_batch_size": run.total_batch_size,
            "device_batch_size": setup.device_batch_size,
            "accumulation_steps": setup.micro_batches,
            "fits": self.fits,
            "usable_bytes": round(self.usable),
            "memory": asdict(self.memory) | {"total": self.memory.total},
            **{name: s and [s.slow, s.fast] for name, s in spans.items()},
            "seconds_by_part": [None if time is None else asdict(time) for time in times],
            "rental_source": self.gpu.rental_source,
            "kernels": dict(setup.kernels),
            "assumptions": assumptions(),
        }


def usable_bytes(memory_gib: float) -> float:
    """Bytes that tensors may take of a GPU sold with so much memory and used by nothing else."""
    return (memory_gib * (1 - DRIVER_SHARE) - RESERVED_GIB) * GIB


def foresee_kernels(
    spec: str, gpu: Hardware, dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """operation -> the implementation that `--kernels=spec` chooses on `gpu`, wherever that is.

    Packages count as installed there if they are here. Raises ValueError for an impossible spec.
    """
    with recording(gpu.architecture):
        choices = choose(spec, torch.device("cuda"), dtype, launching=False)
    return {choice.op: choice.implementation for choice in choices}


def make_plan(run: Run, gpu: Hardware, batch: int | None = None, memory_gib: float = -1) -> Plan:
    """The run on `gpu`.

    batch       device_batch_size; None takes the largest that fits
    memory_gib  of each GPU, where it is not all the table says
    """
    usable = usable_bytes(gpu.memory_gib if memory_gib == -1 else memory_gib)
    setup = run.with_batch(batch or run.largest_batch(usable) or 1)
    known = gpu.bf16_flops is not None
    slow, fast = (step_time(setup, gpu, end) if known else None for end in ("slow", "fast"))
    return Plan(run, gpu, setup, footprint(setup), usable, slow, fast)


def assumptions() -> list[str]:
    """What every forecast rests on, a line each; none of it is measured."""
    lines = [
        f"{name}: {span.slow:g} to {span.fast:g} {text}"
        for name, (span, text) in ASSUMPTIONS.items()
    ]
    return [
        *lines,
        f"memory: {DRIVER_SHARE:.0%} of it and {RESERVED_GIB:g} GiB are not for tensors, and these "
        f"take {HEADROOM - 1:.0%} more than their bytes",
        "evaluations, checkpoints, waiting for data and torch.compile are not counted",
    ]
