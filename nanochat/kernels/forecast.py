"""Forecast of a kernel's time from its compiled code and its launch, without a GPU.

python -m nanochat.kernels.forecast                         every Triton implementation at d20
python -m nanochat.kernels.forecast --only rms_norm --workload d12
python -m nanochat.kernels.forecast --json forecast.json    the same rows as JSON

    t = t0 + max(memory, special, issue, tensor)

    memory   bytes of every tensor that is read or written / (.914 of the peak bandwidth)
    special  special functions / (16 a clock and multiprocessor), and so on for instructions and for
             products, all of them in whole waves of programs

A forecast is no upper bound and no measurement. It is the time of a kernel that hides everything
but its narrowest limit; where one program fits a multiprocessor, which then loads, computes and
stores in turn, `high` adds the limits instead. What PyTorch computes between our kernels counts as
products at GEMM_SHARE of the peak and as bytes. Every binary is that of the implementation's own
tiles, in bfloat16, at the sizes of a training step.

Example: rms_norm, d20, 65,536 rows of 1280 bfloat16 on an H200. Forward moves 336 MB: 6.4 us + 336
MB / (.914 * 4.8 TB/s) = 83 us. Its 16,384 programs of 128 threads issue 99 instructions a thread:
16,384 * 128 * 99 / 128 / (132 multiprocessors * 1.83 GHz) = 6.7 us, which memory hides.

Source  t0 and .914 fit 13 published rows of Liger Kernel on an H100 within 4 %; rates a clock: CUDA
        C++ Programming Guide, throughput of native arithmetic instructions; those of sm_120's
        special functions and GEMM_SHARE are assumed.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat.kernels import aot
from nanochat.kernels.compiled import read_work
from nanochat.kernels.launch import MULTIPROCESSORS, Launch
from nanochat.kernels.registry import Op, operations
from nanochat.kernels.roofline import speed_of_light
from nanochat.kernels.unexecuted import bytes_of, launches
from nanochat.kernels.workloads import WORKLOADS, Workload

HEADS = ("", "kernel", "us", "limit", "MB", "special", "issued", "regs", "shared", "fit", "waves")
COLUMNS = "{:>9} {:28}{:>16} {:8}{:>9}{:>9}{:>8}{:>6}{:>8}{:>5}{:>8}"
T0 = 6.4e-6  # seconds of a launch that does nothing
MEMORY_SHARE = 0.914  # of the peak bandwidth, in a kernel that only streams
RESERVED_SHARED = 1024  # bytes of shared memory that every program takes besides its own


class Machine(NamedTuple):
    """What the forecast divides by; rates are per clock and multiprocessor.

    flops       of products, by bits of an operand's element (32: float32 without tensor cores)
    gemm_share  of the tensor cores' peak in cuBLAS products, assumed
    """

    name: str
    multiprocessors: int
    bytes_per_s: float
    clock: float
    flops: dict[int, float]
    gemm_share: float
    threads: int
    programs: int
    shared_bytes: int
    special: float = 16
    issue: float = 128
    registers: int = 65_536

    @property
    def gemm_flops(self) -> float:
        """FLOP/s assumed of cuBLAS in 16 bits."""
        return self.gemm_share * self.flops[16] * self.multiprocessors * self.clock


# clocks follow from the datasheets' dense bf16 rates: 989.5 and 209.5 TFLOP/s
MACHINES = {
    "sm_90": Machine(
        "H200",
        MULTIPROCESSORS["sm_90"],
        4.8e12,
        1.83e9,
        {16: 4096, 8: 8192, 32: 256},
        0.71,
        2048,
        32,
        233_472,
    ),
    "sm_120": Machine(
        "RTX 5090",
        MULTIPROCESSORS["sm_120"],
        1.792e12,
        2.407e9,
        {16: 512, 8: 1024, 32: 256},
        0.9,
        1536,
        24,
        102_400,
    ),
}


@dataclass(frozen=True, eq=False)
class Forecast:
    """One kernel as launched; seconds, and counts of one thread.

    limit     the narrowest of the terms
    high      where nothing overlaps; equal to `seconds` where several programs fit
    issued    None where the loops of the binary could not be told apart: not part of the terms
    programs  that fit a multiprocessor; `waves` of them cover the grid
    """

    target: str
    op: str
    implementation: str
    kernel: str
    seconds: float
    high: float
    limit: str
    terms: dict[str, float]
    moved: float
    special: float
    issued: float | None
    registers: int
    spills: int
    shared_bytes: int
    programs: int
    waves: float


def resident(machine: Machine, threads: int, registers: int, shared_bytes: int) -> int:
    """Programs that a multiprocessor holds at once; registers are handed out by eights."""
    per_program = math.ceil(registers / 8) * 8 * threads
    return min(
        machine.threads // threads,
        machine.programs,
        machine.registers // per_program,
        machine.shared_bytes // (shared_bytes + RESERVED_SHARED),
    )


def forecast(launch: Launch, op: str, implementation: str, target: str) -> Forecast:
    """Compile a launch and forecast it."""
    machine = MACHINES[target]
    binary = aot.build(launch, aot.TARGETS[target].capability)
    work = read_work(launch, binary.ttir)
    threads = 32 * launch.options["num_warps"]
    special, issued = aot.count(launch, binary)
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    moved = sum(bytes_of(named[name]) for each in (work.loaded, work.stored) for name in each)
    # a multiprocessor that has no program left waits for those of the last wave
    programs = math.prod(launch.grid)
    fit = resident(machine, threads, binary.registers, binary.shared_bytes)
    waves = programs / (machine.multiprocessors * fit)
    rounds = (
        math.ceil(waves) / waves if waves > 1 else 1 / min(1.0, programs / machine.multiprocessors)
    )
    clocks = machine.multiprocessors * machine.clock / (programs * rounds)
    terms = {
        "memory": moved / (MEMORY_SHARE * machine.bytes_per_s),
        "special": threads * special / machine.special / clocks,
        "issue": threads * (issued or 0) / machine.issue / clocks,
        "tensor": sum(f / machine.flops[bits] for bits, f in work.tensor_flops.items()) / clocks,
    }
    limit = max(terms, key=lambda name: terms[name])
    # one program that does not multiply has nobody to compute while it loads
    alone = fit == 1 and not work.tensor_flops
    return Forecast(
        target, op, implementation, launch.kernel.__name__, T0 + terms[limit],
        T0 + (terms["memory"] + max(terms["special"], terms["issue"]) if alone else terms[limit]),
        limit, terms, moved, special, issued, binary.registers,
        binary.spills, binary.shared_bytes, fit, waves,
    )  # fmt: skip


@dataclass(frozen=True)
class Total:
    """One call of an implementation, forward and backward: its kernels, and PyTorch's part.

    light     share of speed of light: what `op.cost` must take at the machine's peaks, over it
    products  seconds of PyTorch's products alone, at GEMM_SHARE of the peak
    """

    target: str
    op: str
    implementation: str
    seconds: float
    light: float
    products: float
    kernels: list[Forecast] = field(default_factory=list)


def forecast_op(op: Op, name: str, target: str, workload: Workload) -> Total:
    """Forecast of one call of an implementation at a size."""
    machine = MACHINES[target]
    recorded, rest = launches(op, name, target, workload)
    # chunks and steps launch the same kernel many times: compiled once, counted every time
    found: dict[Any, Forecast] = {}
    kernels = []
    for launch in recorded:
        sizes = tuple(
            tuple(x.shape) if isinstance(x, torch.Tensor) else str(x) for x in launch.arguments
        )
        key = launch.kernel, launch.grid, str(launch.options), sizes
        if key not in found:
            found[key] = forecast(launch, op.name, name, target)
        kernels.append(found[key])
    products = rest.product_flops / machine.gemm_flops
    others = rest.moved / (MEMORY_SHARE * machine.bytes_per_s) + rest.calls * T0
    seconds = sum(each.seconds for each in kernels) + products + others
    cost = op.cost(*_arguments(op, workload)).passes()
    whole = cost.get("both", cost["forward"])
    peak = machine.flops[16] * machine.multiprocessors * machine.clock
    # norms and optimizers do not multiply matrices: the tensor cores' peak does not bind them
    light = speed_of_light(whole, peak, machine.bytes_per_s)
    return Total(target, op.name, name, seconds, light / seconds, products, kernels)


def _arguments(op: Op, workload: Workload) -> tuple[Any, ...]:
    return op.workload(workload, torch.device("meta"), torch.bfloat16)


def totals(targets: list[str], only: list[str], workload: Workload) -> Iterator[Total]:
    """Every Triton implementation of the operations, one after the other."""
    for target in targets:
        for op in operations().values():
            if not only or op.name in only:
                for name in op.triton_names():
                    yield forecast_op(op, name, target, workload)


def print_total(total: Total) -> None:
    """A line for the call, and one for each kernel that it launches."""
    ours = f"{total.op}={total.implementation}"
    line = f"{total.target:7}{ours:42}{1e3 * total.seconds:8.3f} ms, {100 * total.light:.0f} %"
    if total.products:
        line += f", of which {1e3 * total.products:.3f} ms in PyTorch's products"
    print(line)
    for k in dict.fromkeys(total.kernels):
        times = f"{1e6 * k.seconds:.1f}" + (f"-{1e6 * k.high:.1f}" if k.high > k.seconds else "")
        issued = "-" if k.issued is None else f"{k.issued:.0f}"
        cells = (
            f"{total.kernels.count(k)} x", k.kernel, times, k.limit, f"{k.moved / 1e6:.1f}",
            f"{k.special:.0f}", issued, k.registers, k.shared_bytes, k.programs, f"{k.waves:.2f}",
        )  # fmt: skip
        print(COLUMNS.format(*cells))


def main(argv: list[str] | None = None) -> int:
    """Print the forecasts."""
    parser = argparse.ArgumentParser(prog="nanochat.kernels.forecast", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--target", choices=MACHINES, nargs="*", default=list(MACHINES))
    parser.add_argument("--only", choices=operations(), nargs="*", default=[], help="operations")
    parser.add_argument("--workload", choices=WORKLOADS, default="d20")
    args = parser.parse_args(argv)
    aot.require_compiler(parser.prog)
    print(f"forecast, not measured: {args.workload}, bfloat16, forward and backward; % of light")
    print(COLUMNS.format(*HEADS))
    found = []
    for total in totals(args.target, args.only, WORKLOADS[args.workload]):
        print_total(total)
        found.append(asdict(total))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
