"""What is compared: the recipes, and ablations that change one thing at a time.

An ablation quantizes some products to mxfp4, the others run in the compute dtype:

    fprop_only dgrad_only wgrad_only     one product, scales even, no transform
    fprop_floor fprop_rceil              fprop_only with other scales
    bwd_rtn bwd_sr                       dgrad and wgrad, nearest or stochastic, no transform
    bwd_h_rtn bwd_hs_rtn bwd_rht_rtn     bwd_rtn with a Hadamard transform without signs, with
                                         fixed signs, with new signs every step; bwd_sr with
                                         the last is the recipe mxfp4_rht_sr
"""

from experiments.mxfp4.layers.recipes import FP4, FP4_H, RECIPES, Product, Recipe
from nanochat.settings import require_known

PLAIN = Recipe("plain")
FP4_SR = Product.of("mxfp4 rceil stochastic")
ABLATIONS = {
    recipe.name: recipe
    for recipe in (
        Recipe("fprop_only", fprop=FP4),
        Recipe("dgrad_only", dgrad=FP4),
        Recipe("wgrad_only", wgrad=FP4),
        Recipe("fprop_floor", fprop=Product.of("mxfp4 floor")),
        Recipe("fprop_rceil", fprop=Product.of("mxfp4 rceil")),
        Recipe("bwd_rtn", dgrad=FP4, wgrad=FP4),
        Recipe("bwd_sr", dgrad=FP4_SR, wgrad=FP4_SR),
        Recipe("bwd_h_rtn", dgrad=FP4_H, wgrad=FP4_H, signs="none"),
        Recipe("bwd_hs_rtn", dgrad=FP4_H, wgrad=FP4_H),
        Recipe("bwd_rht_rtn", dgrad=FP4_H, wgrad=FP4_H, signs="random"),
    )
}
# title of a table -> its rows, without the baseline
GROUPS = {
    "recipes": tuple(RECIPES),
    "which product": ("fprop_only", "dgrad_only", "wgrad_only"),
    "scale of the forward pass": ("fprop_floor", "fprop_rceil", "fprop_only"),
    "rounding of the backward pass": ("bwd_rtn", "bwd_sr", "bwd_rht_rtn", "mxfp4_rht_sr"),
    "transform of the backward pass": ("bwd_rtn", "bwd_h_rtn", "bwd_hs_rtn", "bwd_rht_rtn"),
}
CELLS = {PLAIN.name: PLAIN, **RECIPES, **ABLATIONS}


def chosen_cells(names: str) -> list[Recipe]:
    """Recipes of a list such as "plain,quartet"; empty is all. The baseline is always among them.

    Raises  ValueError, with the nearest name, for an unknown one.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(CELLS)
    for name in wanted:
        require_known("cell", name, CELLS)
    return [CELLS[name] for name in dict.fromkeys([PLAIN.name, *wanted])]
