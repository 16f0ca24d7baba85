"""The layer of the Quartet paper: its scales, its masks, its gradients."""

import math
from dataclasses import replace

import torch

from experiments.mxfp4.layers.quartet import inverse_hadamard, quest_quantize
from experiments.mxfp4.layers.recipes import Product, find_recipe
from experiments.mxfp4.numbers.randomness import hadamard
from experiments.mxfp4.tests.support import (
    DY,
    W,
    X,
    run_layer,
)


def test_quest_drops_the_gradients_of_clipped_elements() -> None:
    """Eight bits in the backward pass come near to the gradients that masks and transforms give."""
    eight = Product.of("mxfp8_e4m3")
    recipe = replace(find_recipe("quartet"), dgrad=eight, wgrad=eight, signs="fixed")
    (xq, x_mask), (wq, w_mask) = quest_quantize(X), quest_quantize(W)
    assert not x_mask.all(), "heavy tails are clipped"
    y, dx, dw = run_layer(recipe)
    torch.testing.assert_close(y, xq @ wq.mT)
    exact_dx = inverse_hadamard((DY @ wq) * x_mask)
    exact_dw = inverse_hadamard((DY.mT @ xq) * w_mask)
    for got, want in ((dx, exact_dx), (dw, exact_dw)):
        assert float((got - want).square().mean() / want.square().mean()) < 4e-3


def test_quest_rounds_its_gradients_as_the_recipe_says() -> None:
    first, again = run_layer(find_recipe("quartet")), run_layer(find_recipe("quartet"))
    fixed = run_layer(replace(find_recipe("quartet"), signs="fixed"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [torch.equal(a, b) for a, b in zip(first, fixed, strict=True)] == [True, False, False]


def test_quest_scale_is_of_the_standard_deviation() -> None:
    values, mask = quest_quantize(X)
    blocks = hadamard(X).unflatten(-1, (-1, 32)).flatten(0, 1)
    for i, block in enumerate(blocks.double()):
        std = float((block - block.mean()).square().mean().sqrt())
        scale = 2.0 ** math.floor(math.log2(2.92247856 / 6 * std))
        nearest = min_distance = block.new_full((32,), math.inf)
        for element in (
            -6.0,
            -4.0,
            -3.0,
            -2.0,
            -1.5,
            -1.0,
            -0.5,
            0.0,
            0.5,
            1.0,
            1.5,
            2.0,
            3.0,
            4.0,
            6.0,
        ):
            distance = (block - element * scale).abs()
            nearest = torch.where(distance < min_distance, element * scale, nearest)
            min_distance = torch.minimum(distance, min_distance)
        assert torch.equal(values.unflatten(-1, (-1, 32)).flatten(0, 1)[i].double(), nearest)
        assert torch.equal(mask.unflatten(-1, (-1, 32)).flatten(0, 1)[i], block.abs() < 6 * scale)
