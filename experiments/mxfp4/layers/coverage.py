"""What runs in which format: every product of the model, its share of the FLOPs, and its path.

FLOPs are those of matrix products in training, causal pairs of attention only: the same sum as
GPT.estimate_flops(causal=True).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from experiments.mxfp4.layers.linear import MXLinear
from experiments.mxfp4.layers.recipes import PRODUCTS, Recipe
from nanochat.gpt import GPT

PATHS = {"native": "native", "emulate": "emulated"}  # backend -> how a path is called


@dataclass(frozen=True)
class Row:
    """One class of products.

    layers  what the class is called: attn.c_qkv, lm_head, attention; with ", kept" if unconverted
    path    "native", "emulated", or "plain" where the format is the compute dtype
    share   of the FLOPs of all matrix products
    """

    layers: str
    count: int
    product: str
    format: str
    path: str
    share: float


def coverage_rows(
    model: GPT, layers: Mapping[str, nn.Module], recipe: Recipe, backend: str
) -> list[Row]:
    """A row for each class of layers, product and path."""
    plain = str(model.dtype).removeprefix("torch.")
    total = model.estimate_flops(causal=True)
    # class, product, format, path -> FLOPs a token of each layer in it
    flops: dict[tuple[str, str, str, str], list[int]] = {}

    def add(name: str, product: str, number_format: str, path: str, amount: int) -> None:
        flops.setdefault((name, product, number_format, path), []).append(amount)

    for name, layer in layers.items():
        weight = layer.weight
        for product in PRODUCTS:
            quantized = recipe.product(product) if isinstance(layer, MXLinear) else None
            path = PATHS[backend] if quantized else "plain"
            number_format = quantized.format if quantized else plain
            kind = name.split(".", 2)[2] + ("" if isinstance(layer, MXLinear) else ", kept")
            add(kind, product, number_format, path, 2 * weight.numel())  # pyright: ignore[reportCallIssue]
    for product in PRODUCTS:
        add("lm_head", product, plain, "plain", 2 * model.lm_head.weight.numel())
    # what the model counts beyond its matrices is attention
    linear = sum(map(sum, flops.values()))
    for _ in range(model.config.n_layer):
        add("attention", "all", plain, "plain", (total - linear) // model.config.n_layer)
    return [
        Row(name, len(amounts), product, number_format, path, sum(amounts) / total)
        for (name, product, number_format, path), amounts in flops.items()
    ]


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """ "mxfp4 native" (format and path) -> share of the FLOPs, the largest first."""
    found: dict[str, float] = {}
    for row in rows:
        name = row.format if row.path == "plain" else f"{row.format} {row.path}"
        found[name] = found.get(name, 0.0) + row.share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def table(rows: Sequence[Row]) -> str:
    """What is printed at start: a line for each class of layers, then the shares."""
    lines = []
    for name in dict.fromkeys((row.layers, row.count) for row in rows):
        own = [row for row in rows if (row.layers, row.count) == name]
        paths = ", ".join(
            f"{row.product} {row.format}" + f" {row.path}" * (row.path != "plain") for row in own
        )
        share = sum(row.share for row in own)
        lines.append(f"  {name[0]:17} x {name[1]:<3} {share:6.1%}  {paths}")
    total = ", ".join(f"{name} {share:.1%}" for name, share in shares(rows).items())
    return "\n".join([*lines, f"  FLOPs of matrix products: {total}"])


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as plain values."""
    return {"flop_shares": shares(rows), "products": [asdict(row) for row in rows]}
