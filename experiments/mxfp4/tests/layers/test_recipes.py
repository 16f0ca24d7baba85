"""Recipes: what they quantize, and what they refuse."""

import dataclasses

import pytest

from experiments.mxfp4.layers.recipes import (
    DEFAULT,
    PRODUCTS,
    RECIPES,
    Product,
    Recipe,
    find_recipe,
)
from experiments.mxfp4.numbers.formats import Quantizer

NAMES = [
    *("mxfp8", "mxfp4_rtn", "mxfp4_h_rtn", "mxfp4_rht_sr", "quartet", "quartet_even"),
    *("mx8f_mx4b", "mx8f_mx4b_sr", "mxfp4_no_wgrad", "nvfp4_rtn", "nvfp4_sr"),
]


def test_every_recipe_is_there_under_its_name() -> None:
    assert list(RECIPES) == NAMES
    assert all(find_recipe(name).name == name for name in NAMES)


def test_the_default_multiplies_in_eight_bits_forward_and_four_backward() -> None:
    recipe = find_recipe(DEFAULT)
    formats = [product.format for name in PRODUCTS if (product := recipe.product(name))]
    assert formats == ["mxfp8_e4m3", "mxfp4", "mxfp4"]
    assert recipe.formats == ["mxfp8_e4m3", "mxfp4"]
    assert not recipe.stochastic


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_what_is_true_of_every_recipe(recipe: Recipe) -> None:
    products = {name: recipe.product(name) for name in PRODUCTS}
    if (fprop := products["fprop"]) is not None:
        assert {fprop.a.rounding, fprop.b.rounding} == {"nearest"}, "evaluation is not random"
    for product in products.values():
        if product is not None:
            assert product.a.hadamard == product.b.hadamard, "the transforms must cancel"
    words = str(products)
    assert recipe.stochastic == ("stochastic" in words)
    assert ("sr" in recipe.name or recipe.name.startswith("quartet")) == recipe.stochastic


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["mxfp8"].signs = "random"  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "near"),
    [("mx8f_mxfp4b", "mx8f_mx4b"), ("mxfp4-rtn", "mxfp4_rtn"), ("Quartet", "quartet")],
)
def test_an_unknown_recipe(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"recipe '{name}' is unknown; .*; did you mean '{near}'"):
        find_recipe(name)
    with pytest.raises(ValueError, match="choose mxfp8, mxfp4_rtn,"):
        find_recipe("???")


FP4_H = Product.of("mxfp4 hadamard")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Product.of("mxfp4", "mxfp8_e4m3"), "one format"),
        (lambda: Product.of("mxfp4", "mxfp4 hadamard"), "both the Hadamard transform or neither"),
        (lambda: Recipe("x", fprop=Product.of("mxfp4 rceil stochastic")), "forward pass must not"),
        (lambda: Recipe("x", dgrad=FP4_H, signs="new"), "signs are 'new'"),
        (lambda: Recipe("x", fprop=FP4_H, signs="random"), "random signs need a Hadamard"),
        (lambda: Recipe("x", fprop=FP4_H, quest=True), "quest needs all three"),
        (lambda: Product.of("mxfp5"), "mxfp5"),
    ],
)
def test_what_makes_no_sense(make, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        make()


def test_blocks_of_a_product() -> None:
    assert Product.of("nvfp4").block == 16
    assert Product.of("nvfp4 hadamard").block == 32
    assert Product.of("mxfp4").block == 32
    assert Product(Quantizer("nvfp4"), Quantizer("nvfp4", rounding="stochastic")).block == 16
