"""Compile every shipped kernel configuration for SM90 and SM120, without a GPU, and gate it.

python -m nanochat.kernels.aot                  table of registers, spills, shared memory, products
python -m nanochat.kernels.aot --json aot.json  the same rows as JSON
python -m nanochat.kernels.aot --only relu2_mlp

Each implementation runs over the workloads of d12, d20 and d32 with a recorder in place of the
launcher, so what is compiled is what a training step would launch. The gate: no spills, shared
memory within the block's limit, and tensor-core instructions wherever 16-bit matrices are
multiplied (HGMMA on sm_90, HMMA on sm_120).

Kernels outside this room pass the same gate: `gate` takes any recorded calls and any check of
their matrix products, `print_rows` and `verdict` are the command line's two halves.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat.kernels import optional_triton
from nanochat.kernels.compiled import count_instructions, read_work
from nanochat.kernels.launch import Launch, recording
from nanochat.kernels.optional_triton import triton
from nanochat.kernels.registry import Op, operations
from nanochat.kernels.workloads import WORKLOADS


class Target(NamedTuple):
    """A GPU to compile for.

    capability    90 for sm_90
    shared_bytes  what a block may have of shared memory, with opt-in
    product       SASS instruction of a product of 16-bit matrices
    """

    capability: int
    shared_bytes: int
    product: str


TARGETS = {
    "sm_90": Target(90, 232_448, "HGMMA"),
    "sm_100": Target(100, 232_448, "UTCHMMA"),
    "sm_120": Target(120, 101_376, "HMMA"),
}
SHIPPED = ("sm_90", "sm_120")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 128  # enough to launch every kernel; row counts do not enter the code
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """What one call launches; op, dtype and size are words for the table."""

    op: str
    dtype: str
    size: str
    launches: list[Launch]


@dataclass(frozen=True)
class Binary:
    """A compiled kernel; `spills` are stores of registers to local memory."""

    registers: int
    spills: int
    shared_bytes: int
    seconds: float
    ttir: str
    ptx: str
    sass: str


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    sizes     of the calls that launch it
    products  its matrix instructions
    special   special functions that a thread takes in one program; `issued`, all its instructions,
              None where the loops of the binary could not be told apart
    faults    empty if it ships
    """

    target: str
    op: str
    kernel: str
    dtype: str
    sizes: str
    configuration: str
    registers: int
    spills: int
    shared_bytes: int
    products: str
    special: float
    issued: float | None
    seconds: float
    faults: str


# launch, what it became, its target -> the matrix instructions, and what is wrong with them or ""
Products = Callable[[Launch, Binary, Target], tuple[str, str]]


def tensor_cores(launch: Launch, binary: Binary, target: Target) -> tuple[str, str]:
    """Wherever 16-bit matrices are multiplied, tensor cores must do it."""
    count = len(re.findall(rf"\b{target.product}\b", binary.sass))
    multiplies = re.search(r"tt\.dot .*x(bf16|f16)> \*", binary.ttir)
    fault = f"no {target.product}" if multiplies and not count else ""
    return (f"{count} {target.product}" if count else ""), fault


def specialise(launch: Launch, capability: int) -> tuple[Any, dict[str, Any]]:
    """Source and options exactly as Triton would compile the launch on that GPU."""
    kernel = launch.kernel
    gpu = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    backend = triton.compiler.make_backend(gpu)
    bind = triton.runtime.jit.create_function_from_signature(
        kernel.signature, kernel.params, backend
    )
    bound, specialization, _ = bind(*launch.arguments, **launch.options, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options | {"debug": False}, bound, specialization, None
    )
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return source, options.__dict__


def compile_for(launch: Launch, capability: int) -> Any:
    """The CompiledKernel of a recorded launch, for a GPU of that capability (90, 100, 120)."""
    source, options = specialise(launch, capability)
    gpu = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=gpu, options=options)


def inspect(cubin: bytes) -> tuple[int, str]:
    """Registers a thread and the SASS text of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def cuobjdump(flag: str) -> str:
            command = [tool, flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+)", cuobjdump("--dump-resource-usage"))
        assert usage is not None
        return int(usage[1]), cuobjdump("--dump-sass")


def build(launch: Launch, capability: int) -> Binary:
    """Compile a recorded launch, and measure what came out."""
    start = time.perf_counter()
    compiled = compile_for(launch, capability)
    seconds = time.perf_counter() - start
    registers, sass = inspect(compiled.asm["cubin"])
    # storing zero is no spill: sm_120 passes one to the guard in front of each TMA load
    spills = len(re.findall(r"\bSTL\b[^,]*, R\d", sass))
    texts = (compiled.asm["ttir"], compiled.asm["ptx"], sass)
    return Binary(registers, spills, compiled.metadata.shared, seconds, *texts)


def count(launch: Launch, binary: Binary) -> tuple[float, float | None]:
    """Special functions and instructions of one thread, by the loops' real trip counts."""
    work, threads = read_work(launch, binary.ttir), 32 * launch.options["num_warps"]
    counted = count_instructions(binary.sass, work, threads)
    if counted is None:
        return work.special / threads, None
    return counted.special, counted.issued


def gate(calls: Iterable[Call], target: str, products: Products = tensor_cores) -> Iterator[Row]:
    """Compile what the calls launch, each distinct kernel once, and look for faults."""
    # A kernel is distinct if Triton would compile it again: other constants, types or divisibility.
    distinct: dict[str, tuple[Launch, list[Call]]] = {}
    for call in calls:
        for launch in call.launches:
            source, options = specialise(launch, TARGETS[target].capability)
            key = f"{source.hash()} {sorted(options.items(), key=str)}"
            distinct.setdefault(key, (launch, []))[1].append(call)
    for launch, of_calls in distinct.values():
        binary = build(launch, TARGETS[target].capability)
        found, fault = products(launch, binary, TARGETS[target])
        special, issued = count(launch, binary)
        faults = [fault] if fault else []
        if binary.spills:
            faults.append(f"{binary.spills} spills")
        limit = TARGETS[target].shared_bytes
        if binary.shared_bytes > limit:
            faults.append(f"{binary.shared_bytes} B of shared memory, limit {limit}")
        yield Row(
            target, of_calls[0].op, launch.kernel.__name__, of_calls[0].dtype,
            ",".join(dict.fromkeys(call.size for call in of_calls)),
            " ".join(f"{k}={v}" for k, v in launch.options.items()),
            binary.registers, binary.spills, binary.shared_bytes, found, special, issued,
            round(binary.seconds, 2), ", ".join(faults),
        )  # fmt: skip


def record(op: Op, name: str, target: str, workload: str, dtype: torch.dtype) -> Call:
    """Launches of one call of an implementation, forward and backward."""
    arguments = op.workload(WORKLOADS[workload].small(TOKENS), CPU, dtype)
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_(x.dtype == dtype)
    with recording(target) as recorder:
        outputs = op.implementations[name].call(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = [y.float().sum() for y in outputs if y is not None and y.requires_grad]
        if total:
            torch.stack(total).sum().backward()
    return Call(op.name, str(dtype).removeprefix("torch."), workload, recorder.launches)


def rows(targets: Iterable[str], only: Iterable[str], jobs: int) -> Iterator[Row]:
    """A row for every distinct kernel of every target; `jobs` processes compile."""
    tasks = [
        (op, target, dtype)
        for target in targets
        for op in only or operations()
        for dtype in DTYPES
    ]  # fmt: skip
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(_op_rows, *zip(*tasks, strict=True)))


def _op_rows(name: str, target: str, dtype: torch.dtype) -> list[Row]:
    op = operations()[name]
    calls = (
        record(op, implementation, target, workload, dtype)
        for implementation in op.triton_names()
        for workload in WORKLOADS
    )
    return list(gate(calls, target))


def require_compiler(prog: str) -> None:
    """Raises SystemExit where nothing can be compiled."""
    if not optional_triton.installed:
        raise SystemExit(f"{prog}: {optional_triton.MISSING}")
    if optional_triton.is_interpreting():
        raise SystemExit(f"{prog}: TRITON_INTERPRET is set, nothing can be compiled; unset it")


def print_rows(found: Iterable[Row]) -> list[Row]:
    """All rows, each printed as it comes."""
    line = "{:7}{:52}{:10}{:30}{:>5}{:>6}{:>8}{:>7}  {} {}"
    heads = ["target", "kernel", "dtype", "sizes", "regs", "spill", "shared", "s"]
    print(line.format(*heads, "gate", "products"))
    done = []
    for row in found:
        done.append(row)
        kernel = f"{row.op}.{row.kernel}"
        cells = row.target, kernel, row.dtype, row.sizes, row.registers, row.spills
        verdict = row.shared_bytes, f"{row.seconds:.2f}", row.faults or "ok", row.products
        print(line.format(*cells, *verdict), flush=True)
    return done


def verdict(done: list[Row]) -> int:
    """Print the count and what was refused; the exit status."""
    failed = [row for row in done if row.faults]
    print(f"{len(done)} kernels, {len(failed)} refused by the gate")
    for row in failed:
        print(f"  {row.target} {row.op}.{row.kernel} {row.dtype} {row.configuration}: {row.faults}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a configuration fails the gate."""
    parser = argparse.ArgumentParser(prog="nanochat.kernels.aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=SHIPPED)
    parser.add_argument("--only", choices=operations(), nargs="*", default=[], help="operations")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of up to 5 GB each")
    args = parser.parse_args(argv)
    require_compiler(parser.prog)
    done = print_rows(rows(args.target, args.only, args.jobs))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in done], indent=1) + "\n")
    return verdict(done)


if __name__ == "__main__":
    sys.exit(main())
