"""Profile training steps of a base model, or compare its kernels; nothing is saved but the numbers.

python -m scripts.profile_train --depth=12 --device_batch_size=8 --total_batch_size=65536
python -m scripts.profile_train configs/cpu_small/base_train.py --toggles
torchrun --standalone --nproc_per_node=8 -m scripts.profile_train --depth=20

The settings are those of base_train, whose config files fit. Tokens are random, so there is nothing
to download; losses are therefore those of noise. Tables, records and the trace go to
`<base dir>/profiles/<tag>/`, and python -m nanochat.report shows them.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat import command, configurator, hardware
from nanochat.common import Runtime, print0
from nanochat.gpt import GPT
from nanochat.kernels.optional_triton import compile_refusal
from nanochat.kernels.registry import Choice, select
from nanochat.optim.sharding import BucketOptimizer
from nanochat.profiler import toggles
from nanochat.profiler.memory import measure_memory
from nanochat.profiler.proton import proton_profile
from nanochat.profiler.throughput import WARMUP_STEPS, Meter, console_line, peak_memory_gib
from nanochat.settings import Count, CountOrMinusOne
from nanochat.tracking import Tracker
from nanochat.train import auto_batch, precision, run
from nanochat.train.pretraining import PretrainingSettings
from nanochat.train.profiling import StepProfile, announced
from nanochat.train.session import compiled, launch
from nanochat.train.step import train_step

STAGE = "profile_train"  # in the records
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Settings(PretrainingSettings):
    """Time by operation, MFU, HFU and a trace of a few steps; or each kernel on and off."""

    profile: Count = 3  # steady steps to profile
    num_iterations: CountOrMinusOne = -1  # steps in all; -1: the profiled ones, after ten others
    vocab_size: Count = 65_536  # token ids of the random text
    toggles: bool = False  # compare every kernel alone, without each, all on, all off, compiled
    rounds: Count = 5  # turns of each choice of kernels; two timed steps in each
    proton: bool = False  # Triton's Proton beside it, with our FLOPs and bytes; needs a GPU


def main() -> None:
    # Settings: what is measured, and where.
    settings = configurator.load(Settings)
    runtime, kernels = launch(settings)
    if settings.toggles and runtime.world_size > 1:
        raise ValueError(
            f"--toggles compares kernels on one device, not on {runtime.world_size}; "
            "start it without torchrun"
        )

    # Build: the model of base_train, its optimizers, records.
    config = run.model_config(
        settings.depth, settings.n_kv_head, settings.max_seq_len, settings.vocab_size
    )
    model = run.build_model(config, runtime, settings.seed)
    numerics = precision.prepare(settings.precision, model, runtime, asdict(settings))
    optimizers = setup_optimizers(model, settings, runtime)
    steps = settings.num_iterations
    if steps == -1:
        steps = WARMUP_STEPS + settings.profile + 1
    meter = Meter(
        settings.total_batch_size,
        model.estimate_flops(causal=True),
        model.estimate_flops(causal=False),
        run.device_peaks(runtime),
        runtime.world_size,
        steps,
        emulated=numerics.emulated,
    )
    tag = settings.model_tag or f"d{settings.depth}"
    state = run.TrainState(model, optimizers, meter, "base", tag)
    folder = runtime.base_dir / "profiles" / tag
    trained = compiled(model, settings.compile)
    settings, accumulation = auto_batch.resolved(
        settings, settings.total_batch_size, model, trained, runtime, kernels
    )
    shape = settings.device_batch_size, settings.max_seq_len
    generator = torch.Generator().manual_seed(settings.seed + runtime.rank)

    def random_batches() -> Batches:
        ids = (
            torch.randint(settings.vocab_size, (2, *shape), generator=generator)
            for _ in range(accumulation)
        )
        return [(x.to(runtime.device), y.to(runtime.device)) for x, y in ids]

    if settings.toggles:
        subject = Subject(model, optimizers, random_batches(), runtime)
        tracker = open_records(folder, runtime, settings, kernels)
        compare(subject, settings, tracker, folder)
        tracker.close()
        runtime.close()
        return

    # Loop: steps as in training, without anything between them.
    profile = StepProfile(settings.profile, state, folder, runtime, settings.compile)
    tracker = open_records(folder, runtime, settings, kernels)
    proton = proton_profile(folder / "proton") if settings.proton else contextlib.nullcontext()
    with proton:
        for step in range(steps):
            numerics.begin_step(step)
            profile.begin()
            begun = time.perf_counter()
            result = train_step(trained, optimizers, random_batches(), runtime, settings.grad_clip)
            loss, grad_norm = result.loss.item(), result.grad_norm.item()
            seconds = time.perf_counter() - begun
            found = profile.end(seconds, meter)
            values = meter.update(step, loss, seconds) | {"grad_norm": grad_norm}
            values |= {"memory_gib": peak_memory_gib(runtime)}
            tracker.log("train", step, **values)
            print0(console_line(step, steps, values))
            if found:
                tracker.log("profile", step, **found)
                print0(announced(found, profile.folder))
    profile.close()
    tracker.close()
    runtime.close()


def setup_optimizers(model: GPT, settings: Settings, runtime: Runtime) -> Sequence[BucketOptimizer]:
    """Those of base_train."""
    return model.setup_optimizers(
        settings.embedding_lr,
        settings.unembedding_lr,
        settings.matrix_lr,
        settings.weight_decay,
        distributed=runtime.world_size > 1,
        newton_schulz=settings.newton_schulz,
    )


def open_records(
    folder: Path, runtime: Runtime, settings: Settings, kernels: list[Choice]
) -> Tracker:
    """A new run in the folder's records."""
    header = {"kernels": run.choices_record(kernels)}
    return Tracker(folder, runtime, STAGE, settings, settings.run, header=header)


class Subject:
    """The model, its optimizers and one batch, for `toggles.measure`."""

    def __init__(
        self,
        model: GPT,
        optimizers: Sequence[BucketOptimizer],
        batches: Batches,
        runtime: Runtime,
    ) -> None:
        self.model, self.optimizers, self.batches = model, optimizers, batches
        self.runtime = runtime
        self.compiled: torch.nn.Module | None = None
        self.weights = {name: x.detach().clone() for name, x in model.state_dict().items()}

    def reset(self) -> None:
        """The weights of the start; moments and step counts zero."""
        self.model.load_state_dict(self.weights)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for bucket in optimizer.buckets:
                bucket.state = optimizer.make_state(bucket)

    def train(self, compile: bool) -> float:
        """A step; its loss."""
        if compile and self.compiled is None:
            self.compiled = compiled(self.model, wanted=True)
        model = self.compiled if compile and self.compiled is not None else self.model
        return train_step(model, self.optimizers, self.batches, self.runtime).loss.item()

    def step(self, compiled: bool) -> tuple[float, float]:
        """(loss, seconds)."""
        begun = time.perf_counter()
        loss = self.train(compiled)
        self.runtime.synchronize()
        return loss, time.perf_counter() - begun

    def peak_bytes(self, compiled: bool) -> int | None:
        """By CUDA's allocator; on a CPU by counting storages, which a compiled graph hides."""
        device = self.runtime.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.train(compiled)
            return torch.cuda.max_memory_allocated(device)
        if compiled:
            return None
        report = measure_memory(self.model, self.optimizers, lambda: self.train(compile=False))
        return sum(report.peak.values())


def compare(subject: Subject, settings: Settings, tracker: Tracker, folder: Path) -> None:
    """Measure the toggle matrix, print and record it, and draw it."""
    runtime = subject.runtime
    device, dtype = runtime.device, runtime.dtype
    names = toggles.called(lambda: subject.train(compile=False))
    choices = run.choices_record(select("auto", device, dtype))
    refused = compile_refusal(device.type)
    matrix, absent = toggles.matrix(names, choices, device, dtype, refused)
    print0(f"{len(matrix)} choices of kernels, {settings.rounds} rounds")
    toggles.measure(matrix, subject, settings.rounds)
    name = str(dtype).removeprefix("torch.")
    found = toggles.record(matrix, absent, hardware.name_of(device), name)
    tracker.log("toggles", 0, **found)
    print0("\n\n".join(table.text() for table in toggles.tables(found)))
    if runtime.is_main:
        toggles.draw(found, folder / "toggles.png")
    print0(f"picture: {folder / 'toggles.png'}")


if __name__ == "__main__":
    command.run(main)
