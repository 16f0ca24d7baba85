"""Build a model, load one, and the state of a run as a checkpoint holds it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat import hardware, scaling
from nanochat.command import RunFailedError
from nanochat.common import Runtime, print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.registry import Choice
from nanochat.optim.sharding import BucketOptimizer
from nanochat.profiler.throughput import Meter, Peaks
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.train import checkpoint_read, checkpoint_write, precision


def model_config(depth: int, n_kv_head: int, sequence_len: int, vocab_size: int) -> GPTConfig:
    """Sizes of the model that a depth stands for; n_kv_head -1 is as many as query heads."""
    width = scaling.model_width(depth)
    n_head = width // scaling.HEAD_DIM
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=scaling.num_kv_heads(n_head, n_kv_head),
        n_embd=width,
    )


def build_model(config: GPTConfig, runtime: Runtime, seed: int) -> GPT:
    """A freshly initialised model on the device, without a second copy on the way."""
    with torch.device("meta"):
        model = GPT(config, runtime.dtype)
    model.to_empty(device=runtime.device)
    model.init_weights(seed)
    return model


def load_pretrained(
    spec: str, stage: str, runtime: Runtime, tokenizer: Tokenizer, tag: str = ""
) -> tuple[GPT, dict[str, Any], Path]:
    """The model of a checkpoint of `stage` on the device, its meta and its folder.

    Raises  ValueError where there is none, or it is of another stage or another tokenizer.
    """
    path = checkpoint_read.find(spec or None, stage, runtime.base_dir, tag or None)
    meta = checkpoint_read.load_meta(path)
    if meta.get("stage", stage) != stage:
        raise ValueError(
            f"checkpoint {path} is of stage {meta['stage']}, not {stage}; name one below "
            f"{checkpoint_read.stage_dir(runtime.base_dir, stage)}, or its stage with --source"
        )
    checkpoint_read.require(meta, ["model_config", "tag"], path / checkpoint_read.META_FILE)
    checkpoint_read.check_compatible(
        meta,
        meta["model_config"] | {"vocab_size": tokenizer.get_vocab_size()},
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )
    model = build_model(GPTConfig(**meta["model_config"]), runtime, runtime.seed)
    precision.accept_weights(model, meta)
    model.load_state_dict(checkpoint_read.load_model_state(path, runtime.device))
    print0(f"loaded {path}")
    return model, meta, path


def device_peaks(runtime: Runtime) -> Peaks:
    """FLOP/s of the device: its datasheet's where it is known, and a measured GEMM's."""
    known = hardware.identify(runtime.device)
    measured = hardware.measure_gemm(runtime.device, runtime.dtype)
    if known is None or known.bf16_flops is None:
        print0(
            f"{runtime.device.type}: no datasheet peak known, so no MFU; "
            f"shares are of a measured GEMM of {measured / 1e12:.2f} TFLOP/s"
        )
    return Peaks(known.bf16_flops if known else None, measured)


@dataclass
class TrainState:
    """Everything that decides how a run continues; saved and restored as a whole.

    loader_state      of the last batch used; None before the first.
    saved_step, saved_at  step and folder of this run's newest checkpoint; -1 and None before it.
    skipped           steps without an update because their loss or gradient was not finite.
    skipped_in_a_row  up to now.
    """

    model: GPT
    optimizers: Sequence[BucketOptimizer]
    meter: Meter
    stage: str
    tag: str
    meta: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    saved_step: int = -1
    saved_at: Path | None = None
    min_bpb: float = math.inf
    loader_state: dict[str, Any] | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a tag that no checkpoint can have, before anything is trained."""
        checkpoint_write.check_tag(self.tag)

    def directory(self, runtime: Runtime) -> Path:
        """Folder of the tag: checkpoints and metrics.jsonl."""
        return checkpoint_read.stage_dir(runtime.base_dir, self.stage) / self.tag

    def save(self, runtime: Runtime, keep_last: int) -> None:
        """Write a checkpoint of this step, once. keep_last 0 or less keeps all.

        Raises  RunFailedError where weights or optimizer state are not finite: nothing is written.
        """
        if self.saved_step == self.step:
            return
        rank_state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loader": self.loader_state,
            "rng": torch.get_rng_state(),
            "meter": self.meter.state(),
            "min_bpb": self.min_bpb,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        meta = self.meta | {
            "stage": self.stage,
            "model_config": asdict(self.model.config),
            "num_iterations": self.meter.num_iterations,
        }
        try:
            self.saved_at = checkpoint_write.save(
                checkpoint_read.stage_dir(runtime.base_dir, self.stage),
                self.tag,
                self.step,
                self.model.state_dict(),
                rank_state,
                meta,
                runtime,
                keep_last if keep_last > 0 else None,
            )
        except checkpoint_write.NotFiniteError as error:
            raise RunFailedError(
                f"{error}. {self.what_is_saved()}, with lower rates or --grad_clip=1.0"
            ) from error
        self.saved_step = self.step

    def restore(self, paths: Sequence[Path], runtime: Runtime) -> None:
        """Take up the run saved at the first of the paths whose files are whole on every rank.

        Raises  DamagedCheckpointError if none is; ValueError naming both values if it is of another
                model or another world size.
        """
        for path in paths:
            problem = self._restore(path, runtime)
            if not problem:
                print0(f"resuming from {path}")
                return
            print0(f"skipping {path}: {problem}")
        raise checkpoint_read.DamagedCheckpointError(
            f"{paths[0]} cannot be read whole, and no older step was "
            f"{'allowed' if len(paths) == 1 else 'whole'}: name another with --resume_from"
        )

    def _restore(self, path: Path, runtime: Runtime) -> str:
        """Why this checkpoint cannot be taken up, on this rank or another; "" once it has been."""
        meta = checkpoint_read.load_meta(path)
        config = asdict(self.model.config)
        fingerprint = self.meta.get("tokenizer_fingerprint")
        checkpoint_read.check_compatible(meta, config, runtime.world_size, fingerprint)
        weights: dict[str, Any] = {}
        state: dict[str, Any] = {}
        problem = ""
        try:
            weights = checkpoint_read.load_model_state(path, runtime.device)
            state = checkpoint_read.load_rank_state(path, runtime.rank)
        except checkpoint_read.DamagedCheckpointError as error:
            problem = str(error)
        damaged = runtime.all_reduce(torch.tensor(float(bool(problem)), device=runtime.device))
        if damaged:
            return problem or "damaged, as another rank says"
        needed = ("optimizers", "loader", "rng", "meter", "min_bpb")
        checkpoint_read.require(state, needed, path / f"optim_rank{runtime.rank}.pt")
        self.model.load_state_dict(weights)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            rates = [group["initial_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["initial_lr"] = rate  # this run's settings decide, not the saved run's
        torch.set_rng_state(state["rng"])
        self.meter.restore(state["meter"])
        self.step = self.saved_step = meta["step"]
        self.saved_at = path
        self.min_bpb = state["min_bpb"]
        self.skipped = state.get("skipped", 0)  # checkpoints of before skipping have none
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.loader_state = state["loader"]
        return ""

    def what_is_saved(self) -> str:
        """Where to continue after a failure, in words."""
        if self.saved_at is None:
            return "No checkpoint was written yet: start again"
        return f"The checkpoint {self.saved_at} is untouched: --resume from it"


def due(step: int, every: int) -> bool:
    """Whether something done `every` steps (never if not positive) is due at `step`."""
    return step > 0 and every > 0 and step % every == 0


def choices_record(choices: Sequence[Choice]) -> dict[str, str]:
    """operation -> implementation, for checkpoints and records."""
    return {choice.op: choice.implementation for choice in choices}


def reasons_record(choices: Sequence[Choice]) -> dict[str, dict[str, str]]:
    """operation -> why its implementation runs, and why each other one does not."""
    return {c.op: {c.implementation: c.reason, **c.refused} for c in choices}
