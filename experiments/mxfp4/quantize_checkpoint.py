"""Write a checkpoint whose linear layers are stored in mxfp4, 4.25 bits a weight, for inference.

    python -m experiments.mxfp4.quantize_checkpoint --checkpoint=chatsft_checkpoints/latest.pt
    python -m scripts.chat_cli --checkpoint=mxfp4/chatsft_checkpoints/latest.pt

The copy goes to <base dir>/mxfp4/<stage>_checkpoints/<tag>/<step>, out of the way of training.
Embedding and head stay in bfloat16. Every command that loads a checkpoint to evaluate or chat takes
the copy; training from it is an error.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

import torch

from experiments.mxfp4.layers.convert import kept_layers, linear_layers
from experiments.mxfp4.layers.quantized import FORMAT, quantized_state
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import FORMATS, SCALE_MODES, Quantizer
from nanochat import command, configurator, stages
from nanochat.common import print0, setup_training
from nanochat.gpt import GPT
from nanochat.settings import Choices
from nanochat.text.tokenizer import get_tokenizer
from nanochat.train import checkpoint_read, checkpoint_write, run
from nanochat.train.precision import QUANTIZED

FOLDER = "mxfp4"  # of the copies, in the base directory


@dataclass(frozen=True)
class Settings:
    """Quantize the linear layers of a checkpoint to mxfp4."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: Annotated[str, Choices(stages.sources)] = "sft"  # where the path does not say it
    model_tag: str = ""  # tag to look in
    keep: str = ""  # layers that stay in bfloat16: blocks.0,blocks.*.mlp.c_proj
    scale_mode: Annotated[str, Choices(SCALE_MODES)] = "even"  # how a block's scale is rounded
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer


def relative_error(model: GPT, kept: set[str], quantizer: Quantizer) -> float:
    """Squared error of the quantized weights over their squared sum."""
    error = total = 0.0
    for name, layer in linear_layers(model).items():
        if name not in kept:
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            values = reference.dequantize(reference.quantize(weight, quantizer))
            error += float((values - weight).square().sum())
            total += float(weight.square().sum())
    return error / total if total else 0.0


@torch.no_grad()
def main() -> None:
    settings = configurator.load(Settings)
    quantizer = Quantizer(FORMAT, settings.scale_mode)
    keep = [part.strip() for part in settings.keep.split(",") if part.strip()]
    runtime = setup_training("cpu")
    source = stages.of_checkpoint(settings.source, settings.checkpoint).name
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, meta, path = run.load_pretrained(
        settings.checkpoint, source, runtime, tokenizer, settings.model_tag
    )
    if QUANTIZED in meta:
        raise ValueError(f"{path} is quantized already; name the checkpoint it was made of")
    kept = kept_layers(linear_layers(model), keep)
    state = quantized_state(model, keep, quantizer)
    error = relative_error(model, kept, quantizer)
    description = {
        "precision": "mxfp4",
        "quantizer": str(quantizer),
        "bits": FORMATS[FORMAT].bits,
        "keep": keep,
        "relative_error": error,
        "made_of": str(path),
    }
    rewritten = ("files", "environment", "world_size")
    kept_meta = {name: value for name, value in meta.items() if name not in rewritten}
    target = checkpoint_write.save(
        checkpoint_read.stage_dir(runtime.base_dir / FOLDER, source),
        meta["tag"],
        meta["step"],
        state,
        {},
        {**kept_meta, QUANTIZED: description, "quantize_settings": asdict(settings)},
        runtime,
    )
    before, after = (
        sum(t.nbytes for t in tensors.values()) for tensors in (model.state_dict(), state)
    )
    print0(
        f"{target}: {after / 2**20:.1f} MiB instead of {before / 2**20:.1f}; relative squared "
        f"error of the weights {error:.2e}"
    )
    runtime.close()


if __name__ == "__main__":
    command.run(main)
