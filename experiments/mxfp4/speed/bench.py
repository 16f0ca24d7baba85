"""Times of the products, quantizers, layers and decoding on a GPU with block-scaled tensor cores.

    python -m experiments.mxfp4.speed.bench --output=FILE    a GPU is needed, sm_120 or sm_100
    python -m experiments.mxfp4.speed.bench --check          only say whether this GPU will do

bench_sm120.sh runs this, and whole training steps. Times are medians of triton.testing.do_bench, on
random data, with L2 cleared before each round; FLOP/s, bytes/s, GPU, versions and commit go into
the JSON file with them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mxfp4.kernels.gemm import matmul
from experiments.mxfp4.kernels.gemv import gemv
from experiments.mxfp4.kernels.native import require_native
from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.kernels.quantize import quantize
from experiments.mxfp4.layers.backends import BACKENDS
from experiments.mxfp4.layers.linear import MXLinear
from experiments.mxfp4.layers.recipes import RECIPES
from experiments.mxfp4.layers.step_randomness import StepRandomness
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor
from experiments.mxfp4.speed import forecast
from nanochat import command
from nanochat.kernels.optional_triton import triton
from nanochat.tracking import environment, write_json

DEPTHS = (8, 12, 20)
TOKENS = 16_384
LARGE = (8192, 8192, 8192)
BF16 = "bfloat16"
PRODUCTS = ("mxfp4", "mxfp8_e4m3", "nvfp4")
QUANTIZERS = ("mxfp4", "mxfp4 hadamard", "mxfp4 rceil stochastic hadamard", "mxfp8_e4m3 rceil")
LAYERS = ("mxfp4_rtn", "mx8f_mx4b", "mxfp8", "quartet_even")
WITH_QUANTIZER = "mxfp4, Hadamard and quantizer of a included"

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Case:
    """Something to time.

    flops, bytes  of one run at least; 0: not counted
    """

    kind: str
    name: str
    shape: str
    run: Callable[[], Any]
    flops: float = 0.0
    bytes: float = 0.0


def random_codes(rows: int, columns: int, name: str, device: torch.device) -> ScaledTensor:
    """A random matrix in a format, quantized from normal numbers."""
    x = torch.randn((rows, columns), device=device, dtype=torch.bfloat16)
    scale = reference.tensor_scale(x) if name == "nvfp4" else None
    quantized, _ = quantize(x, Quantizer(name), scale=scale)
    assert quantized is not None
    return quantized


def gemm_cases(shapes: Iterable[tuple[int, int, int]], device: torch.device) -> Iterator[Case]:
    """c (M, N) = a b^T in bfloat16 and in each format, operands quantized already."""
    for m, n, k in shapes:
        flops, shape = 2.0 * m * n * k, f"{m} x {n} x {k}"
        a, b = (torch.randn((r, k), device=device, dtype=torch.bfloat16) for r in (m, n))
        yield Case("gemm", BF16, shape, lambda a=a, b=b: F.linear(a, b), flops)
        for name in PRODUCTS:
            qa, qb = random_codes(m, k, name, device), random_codes(n, k, name, device)
            yield Case("gemm", name, shape, lambda a=qa, b=qb: matmul(a, b), flops)
        q = Quantizer("mxfp4", hadamard=True)
        weight, _ = quantize(b, q)

        def quantized_too(a: Tensor = a, weight: Any = weight, q: Quantizer = q) -> Tensor:
            codes, _ = quantize(a, q)
            assert codes is not None
            return matmul(codes, weight)

        yield Case("gemm", WITH_QUANTIZER, shape, quantized_too, flops)


def quantize_cases(m: int, k: int, device: torch.device) -> Iterator[Case]:
    """One orientation and both, of bfloat16."""
    x = torch.randn((m, k), device=device, dtype=torch.bfloat16)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    for text in QUANTIZERS:
        q = Quantizer.parse(text)
        for columns, name in ((None, "rows"), (q, "rows and columns")):
            written = FORMATS[q.format].bits / 8 * (1 if columns is None else 2)
            moved = m * k * (2 + written)

            def run(q: Quantizer = q, columns: Quantizer | None = columns) -> Any:
                return quantize(x, q, columns, seed=seed)

            yield Case("quantize", f"{text}: {name}", f"{m} x {k}", run, bytes=moved)


def layer_cases(depth: int, tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward of the linear layers of one block, in bfloat16 and by recipe."""
    layers = forecast.linear_layers(depth)
    weights = [nn.Parameter(torch.randn(x.outputs, x.inputs, device=device)) for x in layers]
    inputs = [
        torch.randn((tokens, x.inputs), device=device, dtype=torch.bfloat16, requires_grad=True)
        for x in layers
    ]
    flops = 6.0 * tokens * sum(x.outputs * x.inputs for x in layers)

    def run(calls: Sequence[Callable[[Tensor], Tensor]]) -> None:
        for weight, x, call in zip(weights, inputs, calls, strict=True):
            y = call(x)
            torch.autograd.grad(y, (x, weight), y.detach())

    plain = [lambda x, w=weight: F.linear(x, w.to(x.dtype)) for weight in weights]
    yield Case("linear", BF16, f"d{depth}", lambda: run(plain), flops)
    for name in LAYERS:
        recipe = RECIPES[name]
        drawn = StepRandomness(device, signs=recipe.signs)
        calls = [MXLinear(weight, recipe, BACKENDS["native"], drawn) for weight in weights]
        yield Case("linear", name, f"d{depth}", lambda calls=calls: run(calls), flops)


def decode_cases(depth: int, device: torch.device) -> Iterator[Case]:
    """One token through the linear layers of a block: bfloat16 weights, and mxfp4 ones."""
    layers = forecast.linear_layers(depth)
    inputs = [torch.randn((1, x.inputs), device=device, dtype=torch.bfloat16) for x in layers]
    dense = [torch.randn((x.outputs, x.inputs), device=device).bfloat16() for x in layers]
    codes = [random_codes(x.outputs, x.inputs, "mxfp4", device) for x in layers]
    weights = sum(x.outputs * x.inputs for x in layers)

    def each(call: Callable[..., Tensor], matrices: Sequence[Any]) -> None:
        for x, w in zip(inputs, matrices, strict=True):
            call(x, w)

    shape = f"d{depth}"
    yield Case("decode", BF16, shape, lambda: each(F.linear, dense), bytes=2.0 * weights)
    bits = FORMATS["mxfp4"].bits
    yield Case("decode", "mxfp4", shape, lambda: each(gemv, codes), bytes=bits / 8 * weights)


def all_cases(device: torch.device, depths: Sequence[int] = DEPTHS) -> Iterator[Case]:
    """Everything, made one after the other."""
    shapes = [(TOKENS, x.outputs, x.inputs) for d in depths for x in forecast.linear_layers(d)]
    yield from gemm_cases([*shapes, LARGE], device)
    yield from quantize_cases(65_536, 3072, device)
    for depth in depths:
        yield from layer_cases(depth, TOKENS, device)
        yield from decode_cases(depth, device)


def measure(cases: Iterable[Case], timer: Timer) -> list[dict[str, Any]]:
    """A row for each case: seconds, and what the kind is judged by."""
    rows = []
    for case in cases:
        seconds = timer(case.run)
        row: dict[str, Any] = {"kind": case.kind, "name": case.name, "shape": case.shape}
        row["seconds"] = seconds
        if case.flops:
            row["tflops"] = case.flops / seconds / 1e12
        if case.bytes:
            row["gb_per_s"] = case.bytes / seconds / 1e9
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def gpu_seconds(run: Callable[[], Any]) -> float:
    """Median of do_bench."""
    milliseconds = triton.testing.do_bench(run, return_mode="median")
    assert isinstance(milliseconds, float)
    return milliseconds / 1e3


def check_gpu() -> dict[str, str]:
    """Format -> matrix instruction. Raises NotNativeError where this GPU will not do."""
    if not torch.cuda.is_available():
        raise NotNativeError(
            "no CUDA GPU; it takes one with block-scaled tensor cores, such as an RTX 5090 (sm_120)"
        )
    return {name: require_native(name) for name in PRODUCTS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.mxfp4.speed.bench", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look whether the GPU will do")
    parser.add_argument(
        "--output", type=Path, default=Path("bench.json"), help="JSON file to write"
    )
    arguments = parser.parse_args(argv)
    try:
        instructions = check_gpu()
    except NotNativeError as error:
        sys.exit(f"nothing to measure here: {error}")
    for name, instruction in instructions.items():
        print(f"{name}: {instruction}")
    if arguments.check:
        return
    torch.manual_seed(0)
    rows = measure(all_cases(torch.device("cuda")), gpu_seconds)
    document = {"environment": environment(), "instructions": instructions, "rows": rows}
    write_json(arguments.output, document)
    print(arguments.output)


if __name__ == "__main__":
    command.run(main)
