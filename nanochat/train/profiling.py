"""`--profile=N`: which steps of a run are profiled, and where what they tell is written."""

from pathlib import Path
from typing import Any

from nanochat import hardware
from nanochat.common import Runtime, print0, replace_file
from nanochat.profiler import breakdown
from nanochat.profiler.capture import Captured, StepCapture
from nanochat.profiler.throughput import WARMUP_STEPS, Meter
from nanochat.train.run import TrainState

FOLDER, TRACE, TEXT = "profile", "trace.json.gz", "profile.txt"  # inside the folder of the run


class StepProfile:
    """Profiles some steps of a run on its first rank; does nothing with steps = 0.

    steps      to profile: the first steady ones, after WARMUP_STEPS where there are enough
    folder     of the run
    compiled   the model runs through torch.compile
    Raises     ValueError where a new run is too short.
    """

    def __init__(
        self, steps: int, state: TrainState, folder: Path, runtime: Runtime, compiled: bool
    ) -> None:
        self.runtime = runtime
        self.folder = folder / FOLDER
        self.compiled = compiled
        self.capture: StepCapture | None = None
        self.wait = 0
        if not steps:
            return
        num_iterations = state.meter.num_iterations
        left = num_iterations - state.step
        # one step more, in which the profiler starts and costs are computed
        if left < steps + 1:
            if state.step == 0:
                raise ValueError(
                    f"--profile={steps} needs a run of at least {steps + 1} steps, of which the "
                    f"first warms up, not {num_iterations}; lower --profile or raise "
                    "--num_iterations"
                )
            print0(f"no profile: {left} steps are left, --profile={steps} needs {steps + 1}")
            return
        if runtime.is_main:
            self.wait = min(WARMUP_STEPS, left - steps - 1)
            on_gpu, trace = runtime.device.type == "cuda", self.folder / TRACE
            self.capture = StepCapture(
                state.model, state.optimizers, steps, on_gpu, compiled, trace
            )

    def begin(self) -> None:
        """Before the first batch of a step."""
        if self.capture is not None and not self.wait:
            self.capture.begin()

    def end(self, seconds: float, meter: Meter) -> dict[str, Any] | None:
        """After a step of so many seconds: the record of the profile, after its last step."""
        if self.capture is None:
            return None
        if self.wait:
            self.wait -= 1
            return None
        captured = self.capture.end(seconds)
        if captured is None:
            return None
        self.capture = None
        # the first of the steps before the profile compiles and fills caches
        before = meter.timed[1 : -len(captured.seconds)]
        record = profile_record(captured, meter, before, self.runtime, self.compiled)
        write(record, self.folder)
        return record

    def close(self) -> None:
        """Stop in the middle, where a run ends."""
        if self.capture is not None:
            self.capture.close()
            self.capture = None


def profile_record(
    captured: Captured, meter: Meter, before: list[float], runtime: Runtime, compiled: bool
) -> dict[str, Any]:
    """The record, with the ceilings of this device."""
    device = runtime.device
    peaks = breakdown.Ceilings(meter.peaks.measured_gemm, hardware.measure_copy(device))
    names = device.type, hardware.name_of(device), str(runtime.dtype).removeprefix("torch.")
    return breakdown.breakdown(captured, meter, peaks, before, *names, compiled)


def write(record: dict[str, Any], folder: Path) -> None:
    """The tables as text, beside the trace."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TEXT, breakdown.text(record) + "\n")


def announced(record: dict[str, Any], folder: Path) -> str:
    """What the console says."""
    return f"{breakdown.text(record)}\n\ntrace for https://ui.perfetto.dev: {folder / TRACE}"
