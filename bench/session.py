"""What the measurements of one run share: device, ceilings, machine, and the rows so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench import rows as row_files
from bench.contenders import auto_choices
from bench.measure import Timer, timer_for
from bench.rows import Row, machine
from nanochat import hardware
from nanochat.common import Runtime
from nanochat.kernels.launch import architecture_of

CPU_COPY_BYTES = 2**26  # enough for a second of a run that measures nothing worth keeping


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes/s: by datasheet (None where unknown) and as measured in this run."""

    flops: float
    bytes: float
    datasheet_flops: float | None
    datasheet_bytes: float | None


@dataclass
class Session:
    """One run of the bench.

    seconds  of measuring, for each operation at each size.
    out      folder of the rows files; None keeps them in memory only.
    """

    runtime: Runtime
    seconds: float
    out: Path | None
    commit: str = ""
    rows: list[Row] = field(default_factory=list)

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured once a run."""
        device, dtype = self.runtime.device, self.runtime.dtype
        known = hardware.identify(device)
        return Ceilings(
            hardware.measure_gemm(device, dtype),
            hardware.measure_copy(device, None if device.type == "cuda" else CPU_COPY_BYTES),
            known.bf16_flops if known and dtype.itemsize == 2 else None,
            known.memory_bytes_per_s if known else None,
        )

    @cached_property
    def machine(self) -> Row:
        """Fields of every row."""
        ceilings = self.ceilings
        return machine(self.runtime.device, self.commit) | {
            "gemm_flops": ceilings.flops,
            "copy_bytes_per_s": ceilings.bytes,
            "datasheet_flops": ceilings.datasheet_flops,
            "datasheet_bytes_per_s": ceilings.datasheet_bytes,
        }

    @cached_property
    def timer(self) -> Timer:
        """Of the device."""
        return timer_for(self.runtime.device)

    @cached_property
    def auto(self) -> dict[str, str]:
        """operation -> implementation of `--kernels=auto`."""
        return auto_choices(self.runtime.device, self.runtime.dtype)

    @property
    def architecture(self) -> str:
        """Name of the configuration table in use."""
        return architecture_of(self.runtime.device)

    @property
    def dtype(self) -> str:
        """Compute dtype, as rows name it."""
        return str(self.runtime.dtype).removeprefix("torch.")

    def keep(self, file: str, rows: Sequence[Row]) -> None:
        """Take rows into the summary, and into <out>/<file>."""
        self.rows += rows
        if self.out is not None:
            row_files.save(self.out / file, rows)
