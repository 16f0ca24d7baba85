"""Rows: one measured, refused or missing contender each, with the machine it ran on.

A file is a JSON list of rows. What is measured again replaces its row, so files grow case by case
and a run that is cut short keeps what it has. A `Session` is one run of the bench: its device, the
ceilings it measured, and its rows so far. `Replay` and `replay` hand the times of a row to
pytest-benchmark, whose own clock sees the host only.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pynvml
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import FAILURES, OURS, REFUSED, TIMED, auto_choices, first_line
from bench.measure import UNSAVED, Timer, timer_for
from nanochat import hardware
from nanochat.common import Runtime, replace_file
from nanochat.kernels.launch import architecture_of
from nanochat.tracking import environment, jsonable

Row = dict[str, Any]
SizeT = TypeVar("SizeT")
IDENTITY = ("kind", "op", "workload", "dtype", "pass", "contender", "gpu")
RESULTS = Path(__file__).parent / "results"
SMALL = "cpu-small"  # the size that shows without a GPU that a measurement works
AUTO_NOISE = 0.03  # within this share of the fastest, `auto` is as good


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


def identity(row: Row) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    return tuple(row.get(name) for name in IDENTITY)


def load(path: Path) -> list[Row]:
    """Rows of a JSON file, or of every rows file in a folder and below.

    Raises  ValueError if there are none, or a file holds something else.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    rows = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist; give a file or folder that bench wrote")
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, list) and all("contender" in row for row in content):
            rows += content
        elif not path.is_dir():
            raise ValueError(f"{file} holds no benchmark rows; give a file that bench wrote")
    if not rows:
        raise ValueError(f"no benchmark rows under {path}; run `pytest bench/ --out={path}` first")
    return rows


def save(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file in one rename; a row measured again replaces the one before."""
    known = {identity(row): row for row in (load(path) if path.exists() else [])}
    for row in rows:
        known[identity(row)] = {key: value for key, value in row.items() if key != UNSAVED}
    lines = ",\n".join(json.dumps(jsonable(row), allow_nan=False) for row in known.values())
    replace_file(path, f"[\n{lines}\n]\n")


def speedup(row: Row, others: Sequence[Row]) -> float | None:
    """How many times faster than the fastest of `others`; None without one."""
    times = [other["seconds"] for other in others if other["status"] == TIMED]
    return min(times) / row["seconds"] if times and row["status"] == TIMED else None


def auto_losses(rows: Sequence[Row]) -> list[str]:
    """Where `--kernels=auto` does not pick the fastest implementation measured, one line each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "kernel" and row["whole"] and row["role"] in ("eager", "ours"):
            key = tuple(row[name] for name in ("op", "workload", "dtype", "gpu"))
            groups.setdefault(key, []).append(row)
    losses = []
    for (op, workload, dtype, _), group in groups.items():
        timed = [row for row in group if row["status"] == TIMED]
        chosen = [row for row in group if row["auto"]]
        if not timed or not chosen:
            continue
        best, auto = min(timed, key=lambda row: row["seconds"]), chosen[0]
        where = f"{op} {workload} {dtype}: auto picks {auto['contender']}"
        if auto["status"] != TIMED:
            losses.append(f"{where}, which was refused: {auto['reason']}")
        elif auto["seconds"] > (1 + AUTO_NOISE) * best["seconds"]:
            share = auto["seconds"] / best["seconds"]
            losses.append(f"{where}, {share:.2f} times the time of {best['contender']}")
    return losses


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

    @property
    def dtype(self) -> str:
        """Compute dtype, as rows name it."""
        return str(self.runtime.dtype).removeprefix("torch.")

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
