"""Quantization error of what a trained model multiplies: activations, weights, gradients.

    python -m experiments.mxfp4.studies.error_tables --checkpoint=base_checkpoints/latest.pt

One batch of validation text runs forward and backward in the compute dtype. Then x, W and dy of
every linear layer in the blocks are quantized along the axis that each product contracts, in every
way of QUANTIZERS:

    relative error  sum (Q(v) - v)^2 / sum v^2
    alignment       sum Q(v) v / sum v^2: 1 is unbiased, below 1 the quantizer shrinks

v is the operand that is quantized: with a Hadamard transform, the transformed one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.mxfp4.layers.backends import relu2
from experiments.mxfp4.layers.convert import convert, linear_layers
from experiments.mxfp4.layers.step_randomness import FIXED_SIGNS
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import Quantizer
from experiments.mxfp4.numbers.randomness import hadamard
from experiments.mxfp4.studies.cells import PLAIN
from nanochat import command, configurator
from nanochat.common import print0, setup_training
from nanochat.data.dataloader import tokenizing_distributed_data_loader
from nanochat.dataset import resolve_data_dir
from nanochat.gpt import GPT
from nanochat.kernels.registry import select
from nanochat.report import table
from nanochat.text.tokenizer import get_tokenizer
from nanochat.tracking import environment, write_json
from nanochat.train import run

QUANTIZERS = (
    "mxfp4 floor",
    "mxfp4 rceil",
    "mxfp4 even",
    "mxfp4 even hadamard",
    "mxfp4 even hadamard, signs",
    "mxfp4 rceil stochastic",
    "mxfp4 rceil stochastic hadamard, signs",
    "nvfp4",
    "nvfp4 hadamard",
    "mxfp8_e4m3 rceil",
    "mxfp8_e4m3 even",
)
SIGNS = ", signs"
# of x (tokens, K), W (N, K) and dy (tokens, N), and their transposes
OPERANDS = ("x", "x^T", "W", "W^T", "dy", "dy^T")


@dataclass(frozen=True)
class Settings:
    """Quantization errors of the operands of a trained model."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    model_tag: str = ""  # tag to look in
    output: str = ""  # JSON file; empty is <base dir>/mxfp4/errors.json
    dataset: str = "auto"  # embedded, fineweb-edu, climbmix, or auto: what is downloaded
    data_dir: str = ""  # folder of text instead of a dataset
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    batch_size: int = 8  # sequences of the batch
    device: str = "auto"  # auto, cuda, mps or cpu


def operands(model: GPT, inputs: Tensor, targets: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """(layer, operand, float32 matrix with the contracted axis last) of one training batch.

    The blocks must call their layers: the caller converts them with a recipe without quantizers.
    """
    # hooks keep the x and dy of every layer during one forward and one backward pass
    seen: dict[str, dict[str, Tensor]] = {}
    handles = []
    for name, layer in linear_layers(model).items():
        seen[name] = {}

        def forward(module: Any, arguments: Any, options: Any, y: Any, at: str = name) -> None:
            x = arguments[0].detach().float().flatten(0, -2)
            seen[at]["x"] = relu2(x) if options.get("squared") else x

        def backward(module: Any, gradients: Any, dy: Any, at: str = name) -> None:
            seen[at]["dy"] = dy[0].detach().float().flatten(0, -2)

        handles.append(layer.register_forward_hook(forward, with_kwargs=True))
        handles.append(layer.register_full_backward_hook(backward))
    model(inputs, targets).backward()
    for handle in handles:
        handle.remove()
    for name, layer in linear_layers(model).items():
        assert isinstance(layer.weight, Tensor)
        for operand, matrix in (seen[name] | {"W": layer.weight.detach()}).items():
            yield name, operand, matrix
            yield name, f"{operand}^T", matrix.mT.contiguous()


def quantizer_of(text: str) -> tuple[Quantizer, Tensor | None]:
    """A quantizer of QUANTIZERS, and the signs of its transform."""
    signs = torch.tensor(FIXED_SIGNS) if text.endswith(SIGNS) else None
    return Quantizer.parse(text.removesuffix(SIGNS)), signs


def error_sums(
    matrix: Tensor, quantizer: Quantizer, signs: Tensor | None
) -> tuple[float, float, float]:
    """Sums of (Q(v) - v)^2, Q(v) v and v^2, in float64."""
    v = (hadamard(matrix, signs) if quantizer.hadamard else matrix).double()
    t = reference.quantize(matrix, quantizer, signs=signs)
    q = reference.dequantize(t, torch.float64)
    return float((q - v).square().sum()), float((q * v).sum()), float(v.square().sum())


def measure(found: Iterator[tuple[str, str, Tensor]]) -> list[dict[str, Any]]:
    """A row for each class of layers (attn.c_qkv), operand and quantizer."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for name, operand, matrix in found:
        kind = name.split(".", 2)[2]
        for text in QUANTIZERS:
            own = sums.setdefault((kind, operand, text), [0.0, 0.0, 0.0])
            for i, value in enumerate(error_sums(matrix, *quantizer_of(text))):
                own[i] += value
    return [
        {
            "layers": kind,
            "operand": operand,
            "quantizer": text,
            "relative_error": error / total if total else None,
            "alignment": aligned / total if total else None,
        }
        for (kind, operand, text), (error, aligned, total) in sums.items()
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """Relative errors in thousandths, a table for each of activations, weights and gradients."""
    rows: Sequence[Mapping[str, Any]] = document["rows"]
    kinds = list(dict.fromkeys(row["layers"] for row in rows))
    cells = {
        (row["layers"], row["operand"], row["quantizer"]): (
            f"{1e3 * row['relative_error']:.1f} ({row['alignment']:.3f})"
            if row["relative_error"] is not None
            else ""
        )
        for row in rows
    }
    parts = ["# Quantization errors of a trained model's operands", document["what"]]
    for title, names in (
        ("Activations", OPERANDS[:2]),
        ("Weights", OPERANDS[2:4]),
        ("Gradients", OPERANDS[4:]),
    ):
        columns = [(kind, name) for kind in kinds for name in names]
        lines = [(text, *(cells[(*column, text)] for column in columns)) for text in QUANTIZERS]
        heads = ("", *(" ".join(column) for column in columns))
        parts.append(f"## {title}\n\n{table(heads, lines)}")
    parts.append("Relative squared error in thousandths, alignment in brackets.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device)
    select("reference", runtime.device, runtime.dtype)
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, meta, _ = run.load_pretrained(
        settings.checkpoint, "base", runtime, tokenizer, settings.model_tag
    )
    convert(model, PLAIN, backend="emulate")
    folder = resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir)
    length = model.config.sequence_len
    batches = tokenizing_distributed_data_loader(
        tokenizer, folder, settings.batch_size, length, "val", device=runtime.device
    )
    rows = measure(operands(model, *next(batches)))
    config = meta["model_config"]
    what = (
        f"Depth {config['n_layer']}, width {config['n_embd']}, step {meta['step']} of a run of "
        f"{meta.get('num_iterations')}; {settings.batch_size} sequences of {length} validation "
        f"tokens; {str(runtime.dtype).removeprefix('torch.')} on {runtime.device.type}."
    )
    document = {"what": what, "settings": asdict(settings), "rows": rows}
    output = Path(settings.output or runtime.base_dir / "mxfp4" / "errors.json")
    write_json(output, document | {"environment": environment()})
    output.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    print0(output.with_suffix(".md"))
    runtime.close()


if __name__ == "__main__":
    command.run(main)
