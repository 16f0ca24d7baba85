"""Compile every kernel that training and decoding launch, without a GPU, and gate it.

    python -m experiments.mxfp4.speed.aot                   registers, spills, shared memory, mma
    python -m experiments.mxfp4.speed.aot --json aot.json   the same rows as JSON
    python -m experiments.mxfp4.speed.aot --target sm_120

The gate is that of nanochat.kernels.aot: no spills, and shared memory within a block's limit. In
place of 16-bit tensor cores it asks for a block-scaled instruction in each product where GPUs have
them (sm_100, sm_120). On sm_90 products refuse to run, so only quantizing and decoding ship there;
one product of each format is compiled to see that it is not native.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.kernels.gemv import gemv
from experiments.mxfp4.kernels.native import example_operand, is_native
from experiments.mxfp4.kernels.ptx import block_scaled, matrix_products
from experiments.mxfp4.kernels.quantize import quantize
from experiments.mxfp4.layers.backends import BACKENDS, OperandSpec
from experiments.mxfp4.layers.recipes import RECIPES
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer
from nanochat.kernels import aot
from nanochat.kernels.launch import Launch, recording
from nanochat.tracking import write_json

NATIVE_TARGETS = ("sm_100", "sm_120")
RMS_NORM_PAIRS = (("mxfp4 even", "mxfp4 even"), ("mxfp8_e4m3 rceil", "mxfp4 even hadamard"))
RELU2_QUANTIZERS = {"mxfp4": "mxfp4 even", "mxfp8_e4m3": "mxfp8_e4m3 rceil"}
EVEN_K, MASKED_K = 768, 640  # whole blocks along K in every kernel, and a last one that is not


def recorded(target: str, op: str, kind: str, size: str, run: Callable[[], Any]) -> aot.Call:
    """What `run` would launch on a target, under three words for the table."""
    with recording(target) as recorder:
        run()
    return aot.Call(op, kind, size, recorder.launches)


def quantize_calls(target: str) -> Iterator[aot.Call]:
    """What each recipe launches for the operands of a layer, in training and without gradients."""
    seed = torch.zeros((), dtype=torch.int64)
    native = BACKENDS["native"]
    x, weight = torch.zeros(256, EVEN_K, dtype=torch.bfloat16), torch.zeros(256, EVEN_K)
    for recipe in RECIPES.values():
        if recipe.quest:  # emulated only
            continue
        signs = seed if recipe.signs == "random" else None
        fprop, dgrad, wgrad = recipe.fprop, recipe.dgrad, recipe.wgrad
        operands = (
            ("x", x, fprop and fprop.a, wgrad and wgrad.b, False),
            ("relu2(x)", x, fprop and fprop.a, wgrad and wgrad.b, True),
            ("x", x, fprop and fprop.a, None, False),
            ("relu2(x)", x, fprop and fprop.a, None, True),
            ("W", weight, fprop and fprop.b, dgrad and dgrad.b, False),
            ("W", weight, fprop and fprop.b, None, False),
            ("dy", x, dgrad and dgrad.a, wgrad and wgrad.a, False),
        )
        for name, matrix, rows, columns, squared in operands:
            # the forward pass has no signs: of the rows only those of dy may have them
            row_signs = signs if name == "dy" and rows and rows.hadamard else None
            column_signs = signs if columns and columns.hadamard else None
            row_spec = rows and OperandSpec(rows, row_signs)
            column_spec = columns and OperandSpec(columns, column_signs)
            yield recorded(
                target, "quantize", name, recipe.name,
                lambda m=matrix, r=row_spec, c=column_spec, s=squared: (
                    native.quantize(m, r, c, seed, 0, s)
                ),
            )  # fmt: skip
    for rows, columns in RMS_NORM_PAIRS:
        pair = Quantizer.parse(rows), Quantizer.parse(columns)
        yield recorded(
            target, "quantize", "rms_norm", f"[{rows}] [{columns}]",
            lambda pair=pair: quantize(x, *pair, prologue="rms_norm"),
        )  # fmt: skip


def product_calls(target: str) -> Iterator[aot.Call]:
    """Products of each format with every epilogue, whole and masked along K."""
    for fmt, k in (*itertools.product(FORMATS, [EVEN_K]), ("mxfp4", MASKED_K)):
        a, b = example_operand(fmt, 256, k), example_operand(fmt, 384, k)
        out = torch.empty(256, 384)
        runs: dict[str, Callable[[], Any]] = {
            "store": lambda a=a, b=b: gemm.matmul(a, b),
            "add": lambda a=a, b=b, out=out: gemm.matmul_add_(out, a, b),
            "split": lambda a=a, b=b, out=out: gemm.matmul_add_(out, a, b, splits=2),
        }
        if fmt in RELU2_QUANTIZERS:
            q = Quantizer.parse(RELU2_QUANTIZERS[fmt])
            runs["relu2"] = lambda a=a, b=b, q=q: gemm.matmul_relu2(a, b, q)
            runs["relu2 keep"] = lambda a=a, b=b, q=q: gemm.matmul_relu2(a, b, q, keep=True)
        for name, run in runs.items():
            yield recorded(target, "gemm", fmt, f"{name} K={k}", run)


def decode_calls(target: str) -> Iterator[aot.Call]:
    """One row, and several."""
    weight = example_operand("mxfp4", 768, 768)
    for rows in (1, 8):
        x = torch.empty(rows, 768, dtype=torch.bfloat16)
        yield recorded(target, "gemv", "mxfp4", f"M={rows}", lambda x=x: gemv(x, weight))


def block_scaled_products(
    launch: Launch, binary: aot.Binary, target: aot.Target
) -> tuple[str, str]:
    """The matrix instructions of a kernel; a fault where a product is not block-scaled."""
    found = matrix_products(binary.ptx)
    native = block_scaled(found)
    fault = "not block-scaled" if "ELEMENT" in launch.options and not native else ""
    return native or ", ".join(found), fault


def rows(targets: list[str]) -> Iterator[aot.Row]:
    """A row for every distinct kernel of every target."""
    for target in targets:
        calls = [*quantize_calls(target), *decode_calls(target)]
        if target in NATIVE_TARGETS:
            calls += product_calls(target)
        yield from aot.gate(calls, target, block_scaled_products)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel fails the gate."""
    parser = argparse.ArgumentParser(prog="experiments.mxfp4.speed.aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--target", choices=aot.TARGETS, nargs="*", default=list(aot.TARGETS))
    args = parser.parse_args(argv)
    aot.require_compiler(parser.prog)
    done = aot.print_rows(rows(args.target))
    native = {t: {fmt: is_native(fmt, t) for fmt in FORMATS} for t in args.target}
    for target, answers in native.items():
        print(target, "native:", ", ".join(f for f, yes in answers.items() if yes) or "nothing")
    if args.json:
        write_json(args.json, {"rows": done, "native": native})
    return aot.verdict(done)


if __name__ == "__main__":
    sys.exit(main())
