"""--precision=mxfp4: what nanochat.train.precision loads by name."""

from collections.abc import Mapping
from typing import Any

from experiments.mxfp4.layers import coverage
from experiments.mxfp4.layers.convert import convert
from experiments.mxfp4.layers.quantized import accept_quantized
from experiments.mxfp4.layers.recipes import DEFAULT, find_recipe
from nanochat.common import Runtime, print0
from nanochat.gpt import GPT
from nanochat.kernels.optional_triton import installed, triton
from nanochat.train.precision import Precision

OPTIONS = ("mx_recipe", "mx_backend", "mx_keep")


class MXPrecision(Precision):
    """A model converted for training; record says what every product runs in."""

    def __init__(self, model: GPT, runtime: Runtime, options: Mapping[str, str]) -> None:
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise ValueError(f"mxfp4 has no option {unknown[0]!r}; it takes {', '.join(OPTIONS)}")
        recipe = find_recipe(options.get("mx_recipe") or DEFAULT)
        backend = options.get("mx_backend") or "native"
        keep = [part.strip() for part in options.get("mx_keep", "").split(",") if part.strip()]
        self.conversion = convert(model, recipe, keep, backend, runtime.seed, runtime.rank)
        self.emulated = backend == "emulate"
        self.record = {
            "name": "mxfp4",
            "recipe": recipe.name,
            "backend": backend,
            "emulated": self.emulated,
            "keep": keep,
            "signs": recipe.signs,
            "stochastic": "Philox4x32-10" if recipe.stochastic else None,
            "instructions": self.conversion.instructions,
            "triton": triton.__version__ if installed else None,
            **coverage.record(self.conversion.rows),
        }
        print0(f"precision mxfp4, recipe {recipe.name}, backend {backend}")
        for fmt, instruction in self.conversion.instructions.items():
            print0(f"  {fmt}: {instruction}")
        print0(coverage.table(self.conversion.rows))

    def begin_step(self, step: int) -> None:
        """Draw the random numbers of the step."""
        self.conversion.begin_step(step)


def prepare(model: GPT, runtime: Runtime, options: Mapping[str, str]) -> MXPrecision:
    """Convert the model for training.

    options  mx_recipe, mx_backend ("native" or "emulate"), mx_keep (layers, separated by commas)
    Raises   ValueError and NotNativeError as convert does.
    """
    return MXPrecision(model, runtime, options)


def accept_weights(model: GPT, description: Mapping[str, Any]) -> None:
    """Make room for the weights of a checkpoint that quantize_checkpoint wrote."""
    accept_quantized(model, description)
