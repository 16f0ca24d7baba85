"""Compile every shipped kernel configuration for SM90 and SM120, without a GPU, and gate it.

python -m nanochat.kernels.aot                  table of registers, spills, shared memory, mma
python -m nanochat.kernels.aot --json aot.json  the same rows as JSON
python -m nanochat.kernels.aot --only relu2_mlp

Each implementation runs over the workloads of d12, d20 and d32 with a recorder in place of the
launcher, so what is compiled is what a training step would launch. The gate: no spills, shared
memory within the block's limit, and tensor-core instructions wherever 16-bit matrices are
multiplied (HGMMA on sm_90, HMMA on sm_120).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from nanochat.kernels import (  # noqa: F401  registers every operation
    adamw_step,
    attention,
    linear_cross_entropy,
    newton_schulz,
    norm_rope,
    qk_norm_rope,
    relu2_mlp,
    rms_norm,
)
from nanochat.kernels.launch import Launch, recording
from nanochat.kernels.registry import REGISTRY, Op
from nanochat.kernels.workloads import WORKLOADS

# capability, opt-in shared memory of a block in bytes, instruction of 16-bit matrix products
TARGETS = {"sm_90": (90, 232_448, "HGMMA"), "sm_120": (120, 101_376, "HMMA")}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 128  # enough to launch every kernel; row counts do not enter the code
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One compiled kernel; `spills` are stores to local memory, `faults` is empty if it ships."""

    target: str
    op: str
    kernel: str
    dtype: str
    workloads: str
    configuration: str
    registers: int
    spills: int
    shared_bytes: int
    mma: int
    seconds: float
    faults: str


def record(op: Op, name: str, target: str, workload: str, dtype: torch.dtype) -> list[Launch]:
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
    return recorder.launches


def specialise(launch: Launch, capability: int) -> tuple[ASTSource, dict[str, Any]]:
    """Source and options exactly as Triton would compile the launch on that GPU."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*launch.arguments, **launch.options, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options | {"debug": False}, bound, specialization, None
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def inspect(cubin: bytes) -> tuple[int, str]:
    """Registers a thread and the SASS text of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def cuobjdump(flag: str) -> str:
            command = [TOOLS / "cuobjdump", flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+)", cuobjdump("--dump-resource-usage"))
        assert usage is not None
        return int(usage[1]), cuobjdump("--dump-sass")


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


def compile_for(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a recorded launch for a GPU of that compute capability (90, 100, 120)."""
    source, options = specialise(launch, capability)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def build(launch: Launch, capability: int) -> Binary:
    """Compile a recorded launch, and measure what came out."""
    start = time.perf_counter()
    compiled = compile_for(launch, capability)
    seconds = time.perf_counter() - start
    registers, sass = inspect(compiled.asm["cubin"])
    # a zero is no spill: sm_120 passes one to the guard that stands before each TMA load
    spills = len(re.findall(r"\bSTL\b[^,]*, R\d", sass))
    texts = (compiled.asm["ttir"], compiled.asm["ptx"], sass)
    return Binary(registers, spills, compiled.metadata.shared, seconds, *texts)


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile for `target`; the measured fields of a Row."""
    capability, shared_limit, mma_name = TARGETS[target]
    binary = build(launch, capability)
    mma = len(re.findall(rf"\b{mma_name}\b", binary.sass))
    faults = []
    if binary.spills:
        faults.append(f"{binary.spills} spills")
    if binary.shared_bytes > shared_limit:
        faults.append(f"{binary.shared_bytes} B of shared memory, limit {shared_limit}")
    if re.search(r"tt\.dot .*x(bf16|f16)> \*", binary.ttir) and not mma:
        faults.append(f"no {mma_name}")
    return {
        "registers": binary.registers,
        "spills": binary.spills,
        "shared_bytes": binary.shared_bytes,
        "mma": mma,
        "seconds": round(binary.seconds, 2),
        "faults": ", ".join(faults),
    }


def rows(targets: list[str], only: list[str], jobs: int) -> Iterator[Row]:
    """One row for every distinct kernel, specialisation and target; `jobs` processes compile."""
    tasks = [
        (op.name, target, dtype)
        for target in targets
        for op in REGISTRY.values()
        for dtype in DTYPES
        if op.name in only or not only
    ]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(_op_rows, *zip(*tasks, strict=True)))


def _op_rows(op: str, target: str, dtype: torch.dtype) -> list[Row]:
    distinct: dict[str, tuple[Launch, list[str]]] = {}
    for name in REGISTRY[op].implementations:
        if not name.startswith("triton"):
            continue
        for workload in WORKLOADS:
            for launch in record(REGISTRY[op], name, target, workload, dtype):
                source, options = specialise(launch, TARGETS[target][0])
                key = f"{source.hash()} {sorted(options.items(), key=str)}"
                distinct.setdefault(key, (launch, []))[1].append(workload)
    return [
        Row(
            target,
            op,
            launch.kernel.__name__,
            str(dtype).removeprefix("torch."),
            ",".join(dict.fromkeys(workloads)),
            " ".join(f"{k}={v}" for k, v in launch.options.items()),
            **compile_launch(launch, target),
        )
        for launch, workloads in distinct.values()
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a configuration fails the gate."""
    parser = argparse.ArgumentParser(prog="nanochat.kernels.aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=list(TARGETS))
    parser.add_argument("--only", choices=REGISTRY, nargs="*", default=[], help="operations")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of up to 5 GB each")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        raise SystemExit("aot: TRITON_INTERPRET is set, nothing can be compiled; unset it")
    done = []
    print(f"{'target':7}{'kernel':52}{'dtype':10}{'workloads':13}{'regs':>5}{'spill':>6}"
          f"{'shared':>8}{'mma':>5}{'s':>7}  gate")  # fmt: skip
    for row in rows(args.target, args.only, args.jobs):
        done.append(row)
        print(f"{row.target:7}{row.op + '.' + row.kernel:52}{row.dtype:10}{row.workloads:13}"
              f"{row.registers:5}{row.spills:6}{row.shared_bytes:8}{row.mma:5}{row.seconds:7.2f}"
              f"  {row.faults or 'ok'}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in done], indent=1) + "\n")
    failed = [row for row in done if row.faults]
    print(f"{len(done)} kernels, {len(failed)} refused by the gate")
    for row in failed:
        print(f"  {row.target} {row.op}.{row.kernel} {row.dtype} {row.configuration}: {row.faults}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
