"""One run of the bench: its device, the ceilings it measured, its rows so far, its options.

`Replay` and `replay` hand the times of a row to pytest-benchmark, whose own clock sees the host
only.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pynvml
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import (
    FAILURES,
    OURS,
    REFUSED,
    TIMED,
    Contender,
    auto_choices,
    first_line,
)
from bench.measure import UNSAVED, Timer, timer_for
from bench.rows import Row, save
from nanochat import hardware
from nanochat.common import Runtime
from nanochat.kernels.launch import architecture_of
from nanochat.tracking import environment, write_json

SizeT = TypeVar("SizeT")
SMALL = "cpu-small"  # the size that shows without a GPU that a measurement works


def machine(device: torch.device, commit: str = "") -> Row:
    """Device, versions, commit and date of this run; `commit` where git cannot tell."""
    known = environment()
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "cpu": known["hardware"]["cpu"],
        "commit": known["commit"] or commit or None,
        "dirty": known["dirty"],
        "torch": known["torch"],
        "triton": known["triton"],
        "cuda": known["cuda"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def clocks(device: torch.device) -> Row:
    """Clocks in MHz, power in W and temperature of a GPU at this moment, {} elsewhere."""
    if device.type != "cuda":
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        sm, memory = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, sm),
            "sm_mhz_max": pynvml.nvmlDeviceGetMaxClockInfo(gpu, sm),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, memory),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    except pynvml.NVMLError as error:  # not every virtual machine passes all of it through
        return {"clocks": f"not known: {error}"}


def write_document(config: pytest.Config, name: str, content: Row) -> None:
    """What was measured on the CPU, with what it is, as JSON into the folder --out, if any."""
    out = config.getoption("--out")
    if out is not None:
        known = machine(torch.device("cpu"), config.getoption("--commit"))
        write_json(out / name, {**known, "cpu_count": os.cpu_count(), **content})


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
    by_name: dict[str, dict[tuple[str, str], Row] | str] = field(default_factory=dict)

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

    def row(self, contender: Contender, what: Row) -> Row:
        """Of a contender, whether it was timed or not: the machine, `what`, and what came of it."""
        return self.machine | clocks(self.runtime.device) | what | {
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "contender": contender.name,
            "role": contender.role,
            "status": contender.status,
            "reason": contender.reason,
            "peak_bytes": contender.peak_bytes,
        }  # fmt: skip

    def once(
        self, name: str, file: str, measure: Callable[[], list[Row]]
    ) -> dict[tuple[str, str], Row]:
        """Rows by (pass, contender), measured when first asked for; kept in <out>/<file>.

        What fails, fails every test that asks for it.
        """
        if name not in self.by_name:
            try:
                rows = measure()
            except FAILURES as error:
                self.by_name[name] = first_line(error)
            else:
                self.rows += rows
                if self.out is not None:
                    save(self.out / file, rows)
                self.by_name[name] = {(row["pass"], row["contender"]): row for row in rows}
        found = self.by_name[name]
        if isinstance(found, str):
            pytest.fail(f"{name}: {found}", pytrace=False)
        return found


def chosen(wanted: str, known: Mapping[str, SizeT], small: SizeT) -> list[SizeT]:
    """The sizes of --workloads; without names all on a GPU, the small one elsewhere."""
    if not wanted:
        return list(known.values()) if torch.cuda.is_available() else [small]
    return [size for name, size in {**known, SMALL: small}.items() if name in wanted.split(",")]


def replayed(group: str, *arguments: Any) -> Any:
    """The arguments of a test, the last of them the contender, whose clock replays a row."""
    mark = pytest.mark.benchmark(group=group, timer=Replay())
    return pytest.param(*arguments, id=f"{group.replace(' ', '-')}-{arguments[-1]}", marks=mark)


class Replay:
    """A clock that advances by the next sample between two readings: start, stop, start, ..."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.now = 0.0
        self.running = False

    def __call__(self) -> float:
        if self.running:
            self.now += self.samples.pop(0)
        self.running = not self.running
        return self.now


def replay(row: Row, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    """Give a row's samples and fields to the plugin.

    What was not timed is skipped with the reason; an implementation of ours that is wrong fails.
    """
    if row["status"] != TIMED:
        reason = f"{row['contender']} {row['status']}: {row['reason']}"
        if row["status"] == REFUSED and row.get("role") == OURS:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    marker = request.node.get_closest_marker("benchmark")
    assert marker is not None
    samples: Sequence[float] = row[UNSAVED]
    marker.kwargs["timer"].samples = list(samples)
    benchmark.extra_info.update({key: row[key] for key in row if key != UNSAVED})
    benchmark.pedantic(lambda: None, rounds=len(samples))
