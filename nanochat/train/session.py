"""What the four training scripts do alike around the loops they keep.

runtime, kernels = session.launch(settings)
run = Session(...)                 optimizers, resumed state, records
while not run.stopped:             the loop: it stays in the script
    ...
    with run.training():
        run.log_step(train_step(...), ...)
run.finish()
"""

import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol, cast

import torch
from torch import Tensor

from nanochat import stages
from nanochat.command import RunFailedError
from nanochat.common import (
    COLLECTIVE_TIMEOUT,
    RanksOutOfMemoryError,
    Runtime,
    StoppedError,
    StopRequest,
    print0,
    setup_training,
)
from nanochat.gpt import GPT
from nanochat.kernels.optional_triton import compile_refusal
from nanochat.kernels.registry import Choice, format_choices, select
from nanochat.locks import lock_for_all_ranks
from nanochat.optim import schedule
from nanochat.optim.muon import COEFFICIENTS
from nanochat.profiler.throughput import Meter, console_line, peak_memory_gib
from nanochat.settings import (
    Choices,
    Count,
    CountOrAuto,
    CountOrMinusOne,
    CountOrZero,
    Device,
    NonNegative,
    Positive,
    Range,
    Seed,
)
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.tracking import Tracker
from nanochat.train.checkpoint_read import resumable
from nanochat.train.profiling import StepProfile, announced
from nanochat.train.run import TrainState, choices_record, device_peaks, reasons_record
from nanochat.train.step import StepResult, set_rates


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of every training script; a stage declares a field again to change its default."""

    run: str = "dummy"  # name of the wandb run; "dummy" does not use wandb
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: Device = "auto"  # where to run; auto is CUDA, else MPS, else the CPU
    num_iterations: CountOrMinusOne = -1  # optimizer steps; -1 derives them
    device_batch_size: CountOrAuto = 32  # sequences a device holds at once; auto: those that fit
    embedding_lr: NonNegative = 0.2  # AdamW rate of the embedding at width 768
    unembedding_lr: NonNegative = 0.004  # AdamW rate of the head at width 768
    matrix_lr: NonNegative = 0.02  # Muon rate of the matrices
    newton_schulz: Annotated[str, Choices(COEFFICIENTS)] = "muon"  # Muon's Newton-Schulz polynomial
    weight_decay: NonNegative = 0.0  # decoupled decay of embedding and head
    grad_clip: NonNegative = 0.0  # largest global gradient norm; 0 does not clip
    max_skipped_steps: Count = 10  # steps in a row without finite loss and gradient that end a run
    eval_every: CountOrMinusOne = 250  # steps between validations; -1 validates only at the end
    save_every: CountOrMinusOne = -1  # steps between checkpoints; -1 saves only at the end
    keep_last: Annotated[int, Range(0, also=-1)] = 2  # newest checkpoints kept; 0 or -1 keeps all
    model_tag: str = ""  # folder of the checkpoints; empty is the parent model's
    resume: bool = False  # continue from the newest checkpoint of the tag, if there is one
    resume_from: str = ""  # continue from this checkpoint: file, folder, tag or step
    collective_timeout: Positive = COLLECTIVE_TIMEOUT  # seconds to wait for other ranks
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    profile: CountOrZero = 0  # steady steps to profile: time by operation, MFU, HFU, a trace
    verbose: bool = False  # print why each operation runs as it does
    seed: Seed = 42  # of everything random


def launch(settings: TrainingSettings) -> tuple[Runtime, list[Choice]]:
    """Listen for signals, join the ranks, choose the kernels and print them."""
    runtime = setup_training(
        settings.device, settings.seed, StopRequest(), settings.collective_timeout
    )
    kernels = select(settings.kernels, runtime.device, runtime.dtype)
    print0(format_choices(kernels, settings.verbose))
    return runtime, kernels


class Session:
    """An open run: optimizers, state resumed where that is asked for, records.

    stage            of stages.STAGES
    tag              folder of the checkpoints
    tokens_per_step  of all devices together; the loop may change it on the meter
    record           for the checkpoints and the records
    init_lr_frac     share of the settings' rates
    wandb_run        name of the wandb run, where it is not settings.run
    Raises  ValueError for a bad tag or a checkpoint that does not fit, before anything is written.
    """

    def __init__(
        self,
        stage: str,
        tag: str,
        model: GPT,
        tokenizer: Tokenizer,
        settings: TrainingSettings,
        runtime: Runtime,
        kernels: list[Choice],
        *,
        tokens_per_step: int,
        num_iterations: int,
        record: Mapping[str, Any],
        init_lr_frac: float = 1.0,
        wandb_run: str = "",
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self.stopped = False  # a rank was asked to stop, and all of them know
        self.num_iterations = num_iterations
        self.meter = Meter(
            tokens_per_step,
            model.estimate_flops(causal=True),
            model.estimate_flops(causal=False),
            device_peaks(runtime),
            runtime.world_size,
            num_iterations,
        )
        optimizers = model.setup_optimizers(
            settings.embedding_lr * init_lr_frac,
            settings.unembedding_lr * init_lr_frac,
            settings.matrix_lr * init_lr_frac,
            settings.weight_decay,
            distributed=runtime.world_size > 1,
            newton_schulz=settings.newton_schulz,
        )
        header = {"kernels": choices_record(kernels), **record}
        fingerprint = {"tokenizer_fingerprint": tokenizer.fingerprint()}
        meta = {"settings": asdict(settings), **header, **fingerprint}
        stage = stages.get(stage).name
        self.state = TrainState(model, optimizers, self.meter, stage, tag, meta)
        folder = self.state.directory(runtime)
        self.lock = lock_for_all_ranks(folder / ".run", "use another --model_tag", runtime)
        resumed = []
        if settings.resume or settings.resume_from:
            resumed = resumable(settings.resume_from or None, stage, runtime.base_dir, tag)
        if resumed:
            self.state.restore(resumed, runtime)
        compiles = getattr(settings, "compile", False)
        self.profile = StepProfile(settings.profile, self.state, folder, runtime, compiles)
        self.tracker = Tracker(
            folder,
            runtime,
            stage,
            settings,
            run=wandb_run or settings.run,
            resume_step=self.state.step if resumed else None,
            header=header | {"kernel_reasons": reasons_record(kernels)},
        )
        self.started = time.perf_counter()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def is_last(self) -> bool:
        """Whether every step is done: what remains is to save and to evaluate."""
        return self.state.step >= self.num_iterations

    def log_plan(self, **values: object) -> None:
        """What this run is going to do, for the console and the records."""
        self.tracker.log("plan", self.step, **values)
        print0(" | ".join(f"{name} {value}" for name, value in values.items()))

    def log(self, kind: str, text: str, **values: object) -> None:
        """A result at this step: `text` for the console, the values for the records."""
        self.tracker.log(kind, self.step, **values)
        print0(f"step {self.step:05d} | {text}")

    def set_rates(self, lr_scale: float) -> None:
        """Scale every rate, and set Muon's momentum to this step's."""
        set_rates(self.state.optimizers, lr_scale, schedule.muon_momentum(self.step))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around one step: a signal undoes it and sets `stopped`; a lack of memory ends the run,
        after a checkpoint of the steps before where the ranks agree that nothing has changed.

        Raises  RunFailedError with what to lower.
        """
        self.profile.begin()
        with self._interruptible() as caught:
            yield
        if caught:
            if caught[0][1]:
                self.save()
            raise RunFailedError(
                f"step {self.step}: out of memory ({caught[0][0]}). Lower --device_batch_size, now "
                f"{self.settings.device_batch_size}: a step then has more micro-batches of fewer "
                f"rows. {self.state.what_is_saved()}"
            )

    @contextmanager
    def evaluation(self, name: str) -> Iterator[None]:
        """Around what only looks at the model: a signal leaves it and sets `stopped`; where memory
        runs out, the evaluation is left out and training continues.

        The ranks have to agree, as those of Runtime.sum_over_ranks do.
        """
        with self._interruptible() as caught:
            yield
        if caught:
            text = f"{name} is left out: out of memory ({caught[0][0]})"
            self.log("out_of_memory", text, during=name, reason=caught[0][0])

    @contextmanager
    def _interruptible(self) -> Iterator[list[tuple[str, bool]]]:
        """What a lack of memory said, if there was one, and whether the ranks agree on it; the
        memory is free again."""
        caught: list[tuple[str, bool]] = []
        try:
            yield caught
        except StoppedError:
            self.stopped = True
        except torch.OutOfMemoryError as error:
            caught.append((str(error), isinstance(error, RanksOutOfMemoryError)))
        # by now the error is gone, and with it the frames that held the memory
        if caught:
            torch.cuda.empty_cache()

    def log_step(
        self, result: StepResult, begun: float, lr_scale: float, note: str = "", **more: float
    ) -> None:
        """Record one optimizer step, print its line, and count it.

        A skipped step counts too: its batch is used up, and the schedule continues.
        begun  time.perf_counter() before its first batch.
        note   further text of the console line; more are further values of the record.
        Raises  RunFailedError after settings.max_skipped_steps skipped steps in a row.
        """
        loss, grad_norm = result.loss.item(), result.grad_norm.item()
        seconds = time.perf_counter() - begun
        if profiled := self.profile.end(seconds, self.meter):
            self.log("profile", announced(profiled, self.profile.folder), **profiled)
        if not result.finite:
            self._log_skipped(loss, grad_norm)
            return
        self.state.skipped_in_a_row = 0
        values = self.meter.update(self.step, loss, seconds)
        values |= {"grad_norm": grad_norm, "lr_scale": lr_scale, **more}
        values |= {"memory_gib": peak_memory_gib(self.runtime)}
        self.tracker.log("train", self.step, **values)
        line = console_line(self.step, self.num_iterations, values)
        print0(f"{line} | {note}" if note else line)
        self.state.step += 1

    def _log_skipped(self, loss: float, grad_norm: float) -> None:
        state, most = self.state, self.settings.max_skipped_steps
        state.skipped += 1
        state.skipped_in_a_row += 1
        said = f"loss {loss}, gradient norm {grad_norm}"
        counts = {"in_a_row": state.skipped_in_a_row, "in_all": state.skipped}
        text = f"{said}: no update ({counts['in_a_row']} in a row, {counts['in_all']} in all)"
        self.log("skipped", text, reason=said, **counts)
        state.step += 1
        if state.skipped_in_a_row >= most:
            raise RunFailedError(
                f"{most} steps in a row had no finite loss and gradient, the last of them step "
                f"{self.step - 1}: {said}. None of them changed the weights. "
                f"{state.what_is_saved()}, with lower rates or --grad_clip=1.0"
            )

    def save(self) -> None:
        """Write a checkpoint of this step, once."""
        self.state.save(self.runtime, self.settings.keep_last)

    def finish(self, **values: object) -> None:
        """End: the "end" record; or, where a signal ended the loop early, a checkpoint.

        values  of the record
        """
        self.profile.close()
        stop = self.runtime.stop
        assert stop is not None, "launch() listens for signals"
        if not self.stopped:
            self.tracker.log(
                "end",
                self.step,
                wall_seconds=time.perf_counter() - self.started,
                train_seconds=self.meter.seconds,
                peak_memory_gib=peak_memory_gib(self.runtime),
                skipped_steps=self.state.skipped,
                **values,
            )
            print0(f"done: {self.state.directory(self.runtime)}")
        else:
            self.save()
            print0(f"{stop.name}: saved step {self.step}; continue with --resume")
        self.tracker.close()
        if self.lock is not None:
            self.lock.close()
        self.runtime.close()
        if self.stopped:
            sys.exit(stop.exit_code)


class Batches(Protocol):
    """A loader: batches with inputs and targets, endlessly."""

    def __iter__(self) -> Iterator[Any]: ...

    def close(self) -> None:
        """Let go of files and threads."""
        ...


def first_batches(batches: Batches, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of the first `count` batches of a loader, which is closed after them."""
    try:
        for batch in itertools.islice(batches, count):
            yield batch.inputs, batch.targets
    finally:
        batches.close()


def compiled(model: GPT, wanted: bool) -> torch.nn.Module:
    """The model to run forward and backward; parameters and checkpoints stay the plain model's.

    Raises  ValueError where torch.compile lacks what it generates code for.
    """
    if not wanted:
        return model
    reason = compile_refusal(model.device.type)
    if reason:
        raise ValueError(f"--compile=True cannot work here: {reason}; leave --compile out")
    return cast(torch.nn.Module, torch.compile(model, dynamic=False))
