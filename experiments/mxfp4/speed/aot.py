"""Compile every kernel that training and decoding launch, without a GPU, and gate it.

    python -m experiments.mxfp4.speed.aot                   registers, spills, shared memory, mma
    python -m experiments.mxfp4.speed.aot --json aot.json   the same rows as JSON
    python -m experiments.mxfp4.speed.aot --target sm_120

The gate: no spills, shared memory within a block's limit, and where products are block-scaled
(sm_100, sm_120) a block-scaled instruction in each of them. On sm_90 one product of each format is
compiled to see that it is not: there products refuse to run, and only quantizing and decoding ship.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from triton import knobs

from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.kernels.gemv import gemv
from experiments.mxfp4.kernels.native import is_native
from experiments.mxfp4.kernels.ptx import block_scaled, matrix_products
from experiments.mxfp4.kernels.quantize import quantize
from experiments.mxfp4.layers.backends import BACKENDS, Side
from experiments.mxfp4.layers.recipes import RECIPES
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor
from experiments.mxfp4.numbers.layout import swizzled_shape
from nanochat.kernels.aot import build, specialise
from nanochat.kernels.launch import Launch, recording

SHARED_LIMITS = {"sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}  # bytes a block may have
NATIVE_TARGETS = ("sm_100", "sm_120")
RMS_NORM_PAIRS = (("mxfp4 even", "mxfp4 even"), ("mxfp8_e4m3 rceil", "mxfp4 even hadamard"))
RELU2_ENDS = {"mxfp4": "mxfp4 even", "mxfp8_e4m3": "mxfp8_e4m3 rceil"}
WHOLE, MASKED = 768, 640  # whole blocks along K in every kernel, and a last one that is not


@dataclass(frozen=True)
class Row:
    """One compiled kernel; `instruction` of its matrix products, `faults` is empty if it ships."""

    target: str
    kernel: str
    call: str
    registers: int
    spills: int
    shared_bytes: int
    instruction: str
    faults: str


def operand(fmt: str, rows: int, columns: int) -> ScaledTensor:
    """A matrix of the sizes of a real one, with nothing in it."""
    number = FORMATS[fmt]
    codes = torch.empty((rows, columns // number.elements_per_byte), dtype=torch.uint8)
    scales = torch.empty(swizzled_shape(rows, columns // number.block), dtype=torch.uint8)
    return ScaledTensor(codes, scales, fmt, columns, torch.ones(()) if fmt == "nvfp4" else None)


def quantize_calls(target: str) -> Iterator[tuple[str, list[Launch]]]:
    """What each recipe launches for the operands of a layer, in training and without gradients."""
    seed = torch.zeros((), dtype=torch.int64)
    native = BACKENDS["native"]
    x, weight = torch.zeros(256, WHOLE, dtype=torch.bfloat16), torch.zeros(256, WHOLE)
    for recipe in RECIPES.values():
        if recipe.quest:  # emulated only
            continue
        signs = seed if recipe.signs == "random" else None
        fprop, dgrad, wgrad = recipe.fprop, recipe.dgrad, recipe.wgrad
        calls = (
            ("x", x, fprop and fprop.a, wgrad and wgrad.b, False),
            ("relu2(x)", x, fprop and fprop.a, wgrad and wgrad.b, True),
            ("x", x, fprop and fprop.a, None, False),
            ("relu2(x)", x, fprop and fprop.a, None, True),
            ("W", weight, fprop and fprop.b, dgrad and dgrad.b, False),
            ("W", weight, fprop and fprop.b, None, False),
            ("dy", x, dgrad and dgrad.a, wgrad and wgrad.a, False),
        )
        for name, matrix, rows, columns, squared in calls:
            with recording(target) as recorder:
                row_side = rows and Side(rows)
                column_side = columns and Side(columns, signs if columns.hadamard else None)
                if name == "dy" and rows:
                    row_side = Side(rows, signs if rows.hadamard else None)
                native.quantize(matrix, row_side, column_side, seed, 0, squared)
            orientations = ["rows"] * (rows is not None) + ["columns"] * (columns is not None)
            yield f"{recipe.name} {name} {' '.join(orientations)}", recorder.launches
    for rows, columns in RMS_NORM_PAIRS:
        with recording(target) as recorder:
            pair = Quantizer.parse(rows), Quantizer.parse(columns)
            quantize(x, *pair, prologue="rms_norm")
        yield f"rms_norm(x) [{rows}] [{columns}]", recorder.launches


def product_calls(target: str) -> Iterator[tuple[str, list[Launch]]]:
    """Products of each format with every end, whole and masked along K."""
    for fmt, width in (*itertools.product(FORMATS, [WHOLE]), ("mxfp4", MASKED)):
        a, b = operand(fmt, 256, width), operand(fmt, 384, width)
        with recording(target) as recorder:
            gemm.matmul(a, b)
            gemm.matmul_add_(torch.empty(256, 384), a, b)
            gemm.matmul_add_(torch.empty(256, 384), a, b, splits=2)
            if fmt in RELU2_ENDS:
                for keep in (False, True):
                    gemm.matmul_relu2(a, b, Quantizer.parse(RELU2_ENDS[fmt]), keep)
        yield f"{fmt} K={width}", recorder.launches


def decode_calls(target: str) -> Iterator[tuple[str, list[Launch]]]:
    """One row, and several."""
    for rows in (1, 8):
        with recording(target) as recorder:
            gemv(torch.empty(rows, 768, dtype=torch.bfloat16), operand("mxfp4", 768, 768))
        yield f"{rows} rows", recorder.launches


def row(call: str, launch: Launch, target: str) -> Row:
    """Compile one launch and hold it against the gate."""
    binary = build(launch, int(target.removeprefix("sm_")))
    products = matrix_products(binary.ptx)
    is_product = "ELEMENT" in launch.options
    faults = []
    if binary.spills:
        faults.append(f"{binary.spills} spills")
    if binary.shared_bytes > SHARED_LIMITS[target]:
        faults.append(f"{binary.shared_bytes} B of shared memory, limit {SHARED_LIMITS[target]}")
    if is_product and not block_scaled(products):
        faults.append("not block-scaled")
    end = f" {launch.options['END']}" if is_product else ""
    return Row(
        target, launch.kernel.__name__, call + end, binary.registers, binary.spills,
        binary.shared_bytes, block_scaled(products) or ", ".join(products), ", ".join(faults),
    )  # fmt: skip


def rows(targets: list[str]) -> Iterator[Row]:
    """A row for every distinct kernel of every target."""
    for target in targets:
        seen = set()
        calls = [*quantize_calls(target), *decode_calls(target)]
        if target in NATIVE_TARGETS:
            calls += product_calls(target)
        for call, launches in calls:
            for launch in launches:
                source, options = specialise(launch, int(target.removeprefix("sm_")))
                key = (source.hash(), str(sorted(options.items(), key=str)))
                if key not in seen:
                    seen.add(key)
                    yield row(call, launch, target)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel fails the gate."""
    parser = argparse.ArgumentParser(prog="experiments.mxfp4.speed.aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--target", choices=SHARED_LIMITS, nargs="*", default=list(SHARED_LIMITS))
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        raise SystemExit("aot: TRITON_INTERPRET is set, nothing can be compiled; unset it")
    done = []
    print(f"{'target':7}{'kernel':17}{'call':56}{'regs':>5}{'spill':>6}{'shared':>8}  gate")
    for one in rows(args.target):
        done.append(one)
        kind = re.sub(r".*kind::", "", one.instruction)
        print(f"{one.target:7}{one.kernel:17}{one.call:56}{one.registers:5}{one.spills:6}"
              f"{one.shared_bytes:8}  {one.faults or 'ok'} {kind}", flush=True)  # fmt: skip
    refused = [one for one in done if one.faults]
    native = {t: {fmt: is_native(fmt, t) for fmt in FORMATS} for t in args.target}
    for target, answers in native.items():
        print(target, "native:", ", ".join(f for f, yes in answers.items() if yes) or "nothing")
    if args.json:
        document = {"rows": [asdict(one) for one in done], "native": native}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(done)} kernels, {len(refused)} refused by the gate")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
