"""Where the time of a run goes: debiased loss, tokens per second, MFU, memory, time left."""

import resource
import sys
from dataclasses import dataclass, field

import torch

from nanochat.common import Runtime

LOSS_DECAY = 0.9
WARMUP_STEPS = 10  # left out of the averages: compilation, allocator, clocks
GIB = 2**30


@dataclass(frozen=True)
class Peaks:
    """FLOP/s one device can reach: by its datasheet (None: unknown) and by a measured GEMM."""

    datasheet: float | None
    measured_gemm: float


@dataclass
class Meter:
    """Turns (loss, seconds) of each step into the values of the console line and of the record.

    flops_causal, flops_nanochat  training FLOPs of a token by the two conventions.
    emulated  the number format is emulated: no share of a peak is given, and records say so.
    """

    tokens_per_step: int
    flops_causal: int
    flops_nanochat: int
    peaks: Peaks
    world_size: int
    num_iterations: int
    emulated: bool = False
    smooth_loss: float = 0.0
    updates: int = 0
    seconds: float = 0.0  # of all steps of all runs of this training
    timed: list[float] = field(default_factory=list)

    def update(self, step: int, loss: float, seconds: float) -> dict[str, float | None]:
        """Values after `step`, by the names of the record."""
        self.updates += 1
        self.smooth_loss = LOSS_DECAY * self.smooth_loss + (1 - LOSS_DECAY) * loss
        self.seconds += seconds
        self.timed.append(seconds)
        steady = self.timed[WARMUP_STEPS:] or self.timed
        rate = self.tokens_per_step / seconds
        values: dict[str, float | None] = {
            "loss": loss,
            "smooth_loss": self.smooth_loss / (1 - LOSS_DECAY**self.updates),
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "eta_seconds": (self.num_iterations - step - 1) * sum(steady) / len(steady),
        }
        if self.emulated:
            return values | {"emulated": True}
        return values | {
            "mfu_causal": self._mfu(self.flops_causal, rate, self.peaks.datasheet),
            "mfu_nanochat": self._mfu(self.flops_nanochat, rate, self.peaks.datasheet),
            "gemm_share_causal": self._mfu(self.flops_causal, rate, self.peaks.measured_gemm),
            "gemm_share_nanochat": self._mfu(self.flops_nanochat, rate, self.peaks.measured_gemm),
        }

    def _mfu(self, flops_per_token: int, rate: float, peak: float | None) -> float | None:
        """Share of `peak` that one device spends on the model's own FLOPs."""
        return None if not peak else flops_per_token * rate / (peak * self.world_size)

    def state(self) -> dict[str, float | int]:
        """What a resumed run needs to continue counting."""
        return {
            "smooth_loss": self.smooth_loss,
            "updates": self.updates,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, float | int]) -> None:
        """Continue from `state`."""
        self.smooth_loss = float(state["smooth_loss"])
        self.updates = int(state["updates"])
        self.seconds = float(state["seconds"])


def console_line(step: int, num_iterations: int, values: dict[str, float | None]) -> str:
    """One step in one line; both MFUs as causal / nanochat formula.

    Steps whose number format is emulated are marked instead: their rate is no speed of the format.
    """
    if values.get("emulated"):
        speed = "emulated, no speed"
    else:
        basis = "mfu" if values["mfu_causal"] is not None else "gemm_share"
        shares = (values[f"{basis}_{formula}"] or 0 for formula in ("causal", "nanochat"))
        percent = "/".join(f"{100 * share:.1f}" for share in shares)
        speed = f"{'mfu' if basis == 'mfu' else 'of gemm'} {percent} %"
    eta = values["eta_seconds"] or 0.0
    return (
        f"step {step + 1:05d}/{num_iterations:05d} ({100 * (step + 1) / num_iterations:5.1f} %) | "
        f"loss {values['smooth_loss']:.4f} | grad {values['grad_norm']:.3f} | "
        f"{1000 * (values['step_seconds'] or 0):.0f} ms | "
        f"{values['tokens_per_second']:,.0f} tok/s | "
        f"{speed} | {values['memory_gib']:.2f} GiB | eta {eta / 60:.1f} min"
    )


def peak_memory_gib(runtime: Runtime) -> float:
    """Most memory held so far: allocated on the CUDA device, resident in this process elsewhere."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
