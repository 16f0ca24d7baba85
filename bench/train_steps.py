"""Optimizer steps of one model under different kernels: references, each kernel alone, all of them.

Variants share model, batch and run, turn by turn. A step takes the same tokens in each, in
micro-batches as large as fit. The host's clock counts, as in training: a step ends when its loss is
read. Compiled variants come last, against the baseline measured once more beside them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.contenders import (
    COMPILE,
    EAGER,
    FAILURES,
    MISSING,
    OURS,
    REFUSED,
    TIMED,
    Contender,
    first_line,
)
from bench.measure import free, rotated, summarise
from bench.rows import SMALL, Row, Session, clocks, speedup
from nanochat import gpt, hardware
from nanochat.kernels.registry import REGISTRY, operations, select
from nanochat.optim import adamw, muon
from nanochat.train import run
from nanochat.train.step import train_step

BASELINE, BASE_SPEC = "sdpa", "reference,attention=sdpa"  # references and torch's own attention


@dataclass(frozen=True)
class Size:
    """A model and a step of `sequences` sequences."""

    name: str
    depth: int
    sequences: int = 32
    length: int = 2048
    vocab_size: int = 65_536

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


SIZES = {size.name: size for size in (Size("d12", 12), Size("d20", 20))}
SMALL_SIZE = Size(SMALL, 2, 4, 64, 1024)


@dataclass
class Variant(Contender):
    """A choice of kernels, and whether the model is compiled."""

    role: str = OURS
    spec: str = ""
    compiled: bool = False
    choices: dict[str, str] = field(default_factory=dict)
    model: Any = None
    micro_batch: int = 0  # sequences
    seconds: list[float] = field(default_factory=list)


def eager_variants() -> list[Variant]:
    """References, the baseline, every implementation alone on top of it, and `auto`."""
    in_model = {id(x) for module in (gpt, adamw, muon) for x in vars(module).values()}
    alone = [
        f"{op.name}={name}"
        for op in operations().values()
        if id(op) in in_model
        for name in op.implementations
        if name != "reference" and f"{op.name}={name}" not in BASE_SPEC
    ]
    return [
        Variant(BASELINE, EAGER, spec=BASE_SPEC),
        Variant("auto", spec="auto"),
        *(Variant(choice, spec=f"{BASE_SPEC},{choice}") for choice in alone),
        Variant("reference", "reference", spec="reference"),
    ]


def compiled_variants() -> list[Variant]:
    """The baseline again, it and `auto` compiled."""
    return [
        Variant(f"{BASELINE}, again", EAGER, spec=BASE_SPEC),
        Variant("auto, compile", spec="auto", compiled=True),
        Variant("compile", COMPILE, spec=BASE_SPEC, compiled=True),
    ]


TURNS, STEPS = 3, 2  # timed steps of a variant: STEPS in each of TURNS, after one untimed
LOSS_TOLERANCE = 0.01  # relative, between variants on the same weights


class Bench:
    """A model, its optimizers and a batch."""

    def __init__(self, size: Size, session: Session) -> None:
        self.size, self.session, self.runtime = size, session, session.runtime
        config = run.model_config(size.depth, -1, size.length, size.vocab_size)
        torch.manual_seed(self.runtime.seed)
        self.model = run.build_model(config, self.runtime, self.runtime.seed)
        self.optimizers = self.model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
        shape, device = (size.sequences, size.length), self.runtime.device
        self.inputs, self.targets = (
            torch.randint(size.vocab_size, shape, device=device) for _ in range(2)
        )

    def batches(self, variant: Variant) -> list[tuple[Tensor, Tensor]]:
        """The step's micro-batches, under the variant's kernels from here on."""
        for op, implementation in variant.choices.items():
            REGISTRY[op].use(implementation)
        parts = self.inputs.split(variant.micro_batch), self.targets.split(variant.micro_batch)
        return list(zip(*parts, strict=True))

    def step(self, variant: Variant) -> float:
        """Seconds of an optimizer step."""
        begin = time.perf_counter()
        result = train_step(variant.model, self.optimizers, self.batches(variant), self.runtime)
        loss, norm = result.loss.item(), result.grad_norm.item()
        self.runtime.synchronize()  # the update runs on when the loss is known
        seconds = time.perf_counter() - begin
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(f"loss {loss}, gradient norm {norm}")
        return seconds

    def loss(self, variant: Variant) -> float:
        """Of the whole batch, through the graph that training runs."""
        batches = self.batches(variant)
        losses = [variant.model(x, y, loss_reduction="sum").item() for x, y in batches]
        return sum(losses) / self.size.tokens

    def fit(self, variant: Variant) -> None:
        """Choose the kernels, compile, and find the largest micro-batch that runs."""
        try:
            choices = select(variant.spec, self.runtime.device, self.runtime.dtype)
        except ValueError as error:
            variant.out(MISSING, first_line(error))
            return
        variant.choices = run.choices_record(choices)
        variant.model = torch.compile(self.model, dynamic=False) if variant.compiled else self.model
        variant.micro_batch = self.size.sequences
        while True:
            try:
                self.step(variant)
                return
            except torch.OutOfMemoryError:
                if variant.micro_batch == 1:
                    raise
            variant.micro_batch //= 2
            self.clear()

    def clear(self) -> None:
        """Forget what a failed step left."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        free(self.runtime.device)

    def turn(self, variant: Variant) -> None:
        """One untimed step, then STEPS timed ones; peak memory on the way."""
        device, on_gpu = self.runtime.device, self.runtime.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.step(variant)
        variant.seconds += [self.step(variant) for _ in range(STEPS)]
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device)
            variant.peak_bytes = max(peak, variant.peak_bytes or 0)

    def measure(self, variants: Sequence[Variant]) -> list[Row]:
        """Rows of the variants: fitted, checked on the same weights, timed turn by turn."""
        for variant in variants:
            try:
                self.fit(variant)
            except FAILURES as error:
                variant.out(REFUSED, first_line(error))
                self.clear()
        self.check_losses([variant for variant in variants if variant.status == TIMED])
        for turn in range(TURNS):
            running = {variant.name: variant for variant in variants if variant.status == TIMED}
            for name in rotated(list(running), turn):
                try:
                    self.turn(running[name])
                except FAILURES as error:  # fragmented memory, say: the others continue
                    running[name].out(REFUSED, first_line(error))
                    self.clear()
        found = [self.row(variant) for variant in variants]
        for row in found:
            row["over_eager"] = speedup(row, [other for other in found if other["role"] == EAGER])
        return found

    def check_losses(self, variants: Sequence[Variant]) -> None:
        """Put out every variant whose loss, on the same weights, is not the first one's."""
        losses = [self.loss(variant) for variant in variants]
        for variant, loss in zip(variants, losses, strict=True):
            if abs(loss - losses[0]) > LOSS_TOLERANCE * losses[0]:
                reason = f"loss {loss:.4f} where {variants[0].name} has {losses[0]:.4f}"
                variant.out(REFUSED, reason)

    def row(self, variant: Variant) -> Row:
        """Times, tokens per second, both MFUs and peak memory of a variant."""
        row = self.session.machine | clocks(self.runtime.device) | {
            "kind": "train_step",
            "op": "train_step",
            "workload": self.size.name,
            "pass": "step",
            "dtype": self.session.dtype,
            "contender": variant.name,
            "role": variant.role,
            "status": variant.status,
            "reason": variant.reason,
            "tokens": self.size.tokens,
            "kernels": variant.choices,
        }  # fmt: skip
        if variant.status != TIMED:
            return row
        summary = summarise(variant.seconds)
        rate, ceilings = self.size.tokens / summary["seconds"], self.session.ceilings
        causal, full = (self.model.estimate_flops(is_causal) for is_causal in (True, False))
        sheet = ceilings.datasheet_flops
        return row | summary | {
            "tokens_per_second": rate,
            "mfu_causal": hardware.mfu(causal, rate, sheet) if sheet else None,
            "mfu_nanochat": hardware.mfu(full, rate, sheet) if sheet else None,
            "gemm_share_causal": hardware.mfu(causal, rate, ceilings.flops),
            "gemm_share_nanochat": hardware.mfu(full, rate, ceilings.flops),
            "peak_bytes": variant.peak_bytes,
            "micro_batch_tokens": variant.micro_batch * self.size.length,
        }  # fmt: skip


def measured(size: Size, session: Session, variants: Sequence[Variant]) -> list[Row]:
    """Rows of the variants, on a model of their own."""
    torch._dynamo.reset()
    free(session.runtime.device)  # of the model measured before
    return Bench(size, session).measure(variants)
