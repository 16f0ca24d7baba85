"""Convert a model: its blocks' linear layers become MXLinear; parameters and their names stay.

Embedding and head always stay in the compute dtype: the head's product is one operation with the
loss (kernels.linear_cross_entropy), and its gradients are the most sensitive ones. Attention stays
too. `keep` names what else stays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from experiments.mxfp4.kernels.native import require_native
from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.layers.backends import find_backend
from experiments.mxfp4.layers.coverage import Row, coverage_rows
from experiments.mxfp4.layers.linear import MXMLP, STREAMS, MXLinear
from experiments.mxfp4.layers.recipes import Recipe
from experiments.mxfp4.layers.step_randomness import StepRandomness
from nanochat.gpt import GPT, MLP, Linear
from nanochat.settings import nearest

HEAD = "lm_head"


@dataclass(frozen=True)
class Conversion:
    """A converted model's recipe and randomness, and what every product runs in.

    instructions  format -> the matrix instruction of the native backend
    """

    recipe: Recipe
    backend: str
    keep: tuple[str, ...]
    randomness: StepRandomness
    rows: list[Row] = field(default_factory=list)
    instructions: dict[str, str] = field(default_factory=dict)

    def begin_step(self, step: int) -> None:
        """Draw the random numbers of a step."""
        self.randomness.begin_step(step)


def linear_layers(model: GPT) -> dict[str, nn.Module]:
    """Name -> linear layer of the blocks, converted or not."""
    return {
        f"blocks.{name}": module
        for name, module in model.blocks.named_modules()
        if isinstance(module, Linear | MXLinear)
    }


def kept_layers(names: Iterable[str], keep: Sequence[str]) -> set[str]:
    """Those of `names` that a pattern in `keep` names: itself, what it is in, or by * and ?.

    Raises  ValueError, with the nearest name, for a pattern that names none.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in keep:
        if pattern == HEAD:  # always kept
            continue
        chosen = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not chosen:
            parts = {".".join(n.split(".")[:i]) for n in names for i in range(1, 5)}
            near = nearest(pattern, sorted(parts))
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(
                f"keep: no layer is called {pattern!r}; {hint}layers are {names[0]} to "
                f"{names[-1]}; blocks.0 stands for all layers of a block, "
                "blocks.*.mlp.c_proj for one of every block"
            )
        found |= chosen
    return found


def check_sizes(name: str, layer: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError where the features of a layer do not divide into the blocks of a recipe."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    outputs, inputs = weight.shape
    for what, size, product in (
        ("input", inputs, recipe.fprop),
        ("output", outputs, recipe.dgrad),
    ):
        if product is not None and size % product.block:
            raise ValueError(
                f"{name} has {size} {what} features, which do not divide into blocks of "
                f"{product.block}; keep it with --mx_keep={name}, or take a width that is a "
                f"multiple of {product.block}"
            )


def require_native_products(recipe: Recipe, device: torch.device) -> dict[str, str]:
    """Format -> matrix instruction on the GPU. Raises NotNativeError where one product has none."""
    if recipe.quest:
        raise NotNativeError(f"{recipe.name} has no kernels; emulate it with --mx_backend=emulate")
    if device.type != "cuda":
        raise NotNativeError(
            f"the model is on {device.type}, and {', '.join(recipe.formats)} products need a GPU "
            "with block-scaled tensor cores (sm_100, sm_120); --mx_backend=emulate computes the "
            "same numbers, slowly"
        )
    return {fmt: require_native(fmt) for fmt in recipe.formats}


def convert(
    model: GPT,
    recipe: Recipe,
    keep: Sequence[str] = (),
    backend: str = "native",
    seed: int = 0,
    rank: int = 0,
) -> Conversion:
    """Convert the model in place, before optimizers and torch.compile see it.

    keep     names or patterns of layers that stay in the compute dtype
    backend  "native" or "emulate"
    seed, rank  of stochastic rounding and random signs
    Raises   ValueError for an unknown layer or backend, sizes that do not divide into blocks, and a
             model that is converted already; NotNativeError where native is not possible. The model
             is then unchanged.
    """
    # everything that can be refused is, before the model is touched
    runner = find_backend(backend)
    layers = linear_layers(model)
    if any(isinstance(layer, MXLinear) for layer in layers.values()) or not layers:
        raise ValueError("the model has no plain linear layers to convert: build a new one")
    kept = kept_layers(layers, keep)
    for name, layer in layers.items():
        if name not in kept:
            check_sizes(name, layer, recipe)
    instructions = require_native_products(recipe, model.device) if backend == "native" else {}
    # parameters move over, so optimizers and checkpoints see the model they know
    randomness = StepRandomness(model.device, seed, rank, recipe.signs)
    for index, (name, layer) in enumerate(layers.items()):
        if name not in kept:
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            new = MXLinear(weight, recipe, runner, randomness, index * STREAMS)
            replace_module(model, name, new)
    replace_mlps(model)
    if recipe.stochastic:
        model.register_forward_pre_hook(MicroBatches(randomness))
    rows = coverage_rows(model, linear_layers(model), recipe, backend)
    return Conversion(recipe, backend, tuple(keep), randomness, rows, instructions)


class MicroBatches:
    """Draws new numbers for every training pass of a step."""

    def __init__(self, randomness: StepRandomness) -> None:
        self.randomness = randomness

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self.randomness.begin_micro_batch()


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module of that dotted name is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def replace_mlps(model: GPT) -> None:
    """Networks with a layer that is not plain call their layers, not the operation relu2_mlp."""
    for block in model.blocks:
        mlp = block.mlp
        assert isinstance(mlp, MLP | MXMLP)
        if any(type(layer) is not Linear for layer in (mlp.c_fc, mlp.c_proj)):
            block.mlp = MXMLP(mlp.c_fc, mlp.c_proj)
