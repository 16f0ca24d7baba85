"""A FORECAST, not a measurement: how fast recipes could be on SM120, by the speed of light.

    python -m experiments.mxfp4.speed.forecast

Every product takes the longer of its FLOPs at the rate of its format and its bytes at the memory
bandwidth; every quantizer takes its bytes:

    fprop  reads x and W, writes y in bfloat16        quantize x   reads 2 B, writes its codes
    dgrad  reads dy and W^T, writes dx in bfloat16    quantize dy  reads 2 B, writes its codes
    wgrad  reads dy^T and x^T, adds to dW in float32  quantize W   reads 4 B, writes its codes

Both orientations of a matrix are made in one pass. Launches, tails of waves, norms, residuals and
the optimizer are left out, on both sides of every ratio: a real ratio is smaller. A ratio is of
bfloat16 on the same GPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.mxfp4.layers.recipes import RECIPES, Product, Recipe
from experiments.mxfp4.numbers.formats import FORMATS
from nanochat import command, report, scaling
from nanochat.kernels.registry import Cost
from nanochat.kernels.roofline import speed_of_light

TOKENS = 65_536  # of a micro-batch
CONTEXT = 2048
VOCABULARY = 65_536
DEPTHS = (4, 6, 8, 10, 12, 16, 20)
SHOWN = ("mxfp4_rtn", "mx8f_mx4b", "mxfp8", "mxfp4_rht_sr", "mxfp4_no_wgrad")
WHAT = ("linear layers", "step", "step, were the head in mxfp8 (not built)")
BF16_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True)
class Rates:
    """Ceilings of a GPU: FLOP/s of each kind of element, bytes/s of memory, and their source."""

    name: str
    bf16: float
    fp8: float
    fp4: float
    memory: float
    source: str

    def flops(self, product: Product | None) -> float:
        """FLOP/s of a product; None is bfloat16."""
        if product is None:
            return self.bf16
        return self.fp4 if FORMATS[product.format].element == "e2m1" else self.fp8


# What programs of others reached on an RTX 5090, none of it by this one: bf16 of torch 224-235,
# MXFP4 of qutlass 1215-1311 TFLOP/s; for block-scaled FP8, whose instruction reaches 737, and for
# memory, of 1.792 TB/s, the same share of the ceiling is taken
REACHED = Rates(
    "RTX 5090, as others reached", 225e12, 650e12, 1250e12, 1.5e12,
    "qutlass's plots; main-horse.github.io/posts/5090-mm-perf",
)  # fmt: skip
DATASHEET = Rates(
    "RTX 5090, datasheet", 209.5e12, 419e12, 1676e12, 1.792e12,
    "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A: dense, float32 accumulation",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A linear layer: outputs N, inputs K."""

    outputs: int
    inputs: int


def linear_layers(depth: int) -> list[Layer]:
    """Those of one block."""
    width = scaling.model_width(depth)
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return [Layer(*shape) for shape in shapes]


def code_bytes(product: Product | None) -> float:
    """Bytes an element of an operand in memory, its share of the scale included."""
    return BF16_BYTES if product is None else FORMATS[product.format].bits / 8


def product_seconds(
    m: int, n: int, k: int, product: Product | None, out_bytes: int, rates: Rates
) -> float:
    """Of c (m, n) = a b^T.

    65,536 tokens through 768 -> 3,072 features of d12 in mxfp4, at the rates of REACHED: the FLOPs
    take 247 us; 28 MB of codes and 403 MB of bfloat16 outputs take 287 us. Memory decides, and that
    is why small models gain so little.
    """
    moved = (m * k + n * k) * code_bytes(product) + m * n * out_bytes
    return speed_of_light(Cost(2 * m * n * k, moved), rates.flops(product), rates.memory)


def quantize_seconds(
    elements: int, read: int, products: Sequence[Product | None], rates: Rates
) -> float:
    """One pass over a matrix, writing what each of its quantized products reads."""
    written = [code_bytes(product) for product in products if product is not None]
    return elements * (read + sum(written)) / rates.memory if written else 0.0


def layer_seconds(layer: Layer, recipe: Recipe | None, tokens: int, rates: Rates) -> float:
    """Forward and backward of a linear layer; without a recipe in bfloat16."""
    # one product forward and two backward; each contracts another of the three axes m, n, k
    fprop, dgrad, wgrad = (recipe.fprop, recipe.dgrad, recipe.wgrad) if recipe else (None,) * 3
    m, n, k = tokens, layer.outputs, layer.inputs
    seconds = (
        product_seconds(m, n, k, fprop, BF16_BYTES, rates)
        + product_seconds(m, k, n, dgrad, BF16_BYTES, rates)
        + product_seconds(n, k, m, wgrad, 2 * FP32_BYTES, rates)
        + quantize_seconds(m * k, BF16_BYTES, (fprop, wgrad), rates)
        + quantize_seconds(n * k, FP32_BYTES, (fprop, dgrad), rates)
        + quantize_seconds(m * n, BF16_BYTES, (dgrad, wgrad), rates)
    )
    if fprop is None or dgrad is None:  # the parameter cast to bfloat16
        seconds += n * k * (FP32_BYTES + BF16_BYTES) / rates.memory
    return seconds


def linear_seconds(depth: int, recipe: Recipe | None, rates: Rates, tokens: int = TOKENS) -> float:
    """All linear layers of the blocks, forward and backward."""
    return depth * sum(layer_seconds(each, recipe, tokens, rates) for each in linear_layers(depth))


def step_seconds(
    depth: int,
    recipe: Recipe | None,
    rates: Rates,
    head: Recipe | None = None,
    tokens: int = TOKENS,
    vocabulary: int = VOCABULARY,
) -> float:
    """Linear layers, attention in bfloat16, and the head in bfloat16 or by a recipe of its own."""
    width = scaling.model_width(depth)
    attention = 6 * depth * width * CONTEXT * tokens / rates.bf16
    head_layer = Layer(scaling.padded_vocab_size(vocabulary), width)
    # its products end in the loss: no logits need to reach memory
    flops = 2 * tokens * head_layer.outputs * width
    products = (head.fprop, head.dgrad, head.wgrad) if head else (None,) * 3
    seconds = sum(flops / rates.flops(product) for product in products)
    return linear_seconds(depth, recipe, rates, tokens) + attention + seconds


def table(title: str, rows: dict[str, list[float]]) -> str:
    """Markdown of ratios by depth."""
    lines = [(name, *(f"{ratio:.2f}" for ratio in ratios)) for name, ratios in rows.items()]
    return report.table((title, *(f"d{depth}" for depth in DEPTHS)), lines)


def ratios(name: str, rates: Rates, what: str) -> list[float]:
    """bfloat16's time over a recipe's by depth; what: "linear", "step", or "step, head mxfp8"."""
    recipe = RECIPES[name]
    head = RECIPES["mxfp8"] if what == WHAT[2] else None
    if what == WHAT[0]:
        return [linear_seconds(d, None, rates) / linear_seconds(d, recipe, rates) for d in DEPTHS]
    return [step_seconds(d, None, rates) / step_seconds(d, recipe, rates, head) for d in DEPTHS]


def markdown() -> str:
    """The forecast."""
    parts = [
        "# Forecast for the RTX 5090: upper bounds, NOT MEASURED",
        f"{TOKENS:,} tokens a micro-batch, context {CONTEXT:,}, vocabulary {VOCABULARY:,}. "
        "A ratio is of bfloat16 on the same GPU; launches, norms and the optimizer are left out, "
        "so a real ratio is smaller. Below 1: slower than bfloat16 even at the speed of light.",
    ]
    for rates in (REACHED, DATASHEET):
        parts.append(
            f"## {rates.name}\n\nbf16 {rates.bf16 / 1e12:g}, fp8 {rates.fp8 / 1e12:g}, fp4 "
            f"{rates.fp4 / 1e12:g} TFLOP/s, {rates.memory / 1e12:g} TB/s. Source: {rates.source}."
        )
        for what in WHAT:
            parts.append(table(what, {name: ratios(name, rates, what) for name in SHOWN}))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    sys.stdout.write(markdown())


if __name__ == "__main__":
    command.run(main)
