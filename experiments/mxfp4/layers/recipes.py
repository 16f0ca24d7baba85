"""Recipes: which of the three products of a linear layer are quantized, and how.

    fprop  y  = Q(x) Q(W)^T            dgrad  dx = Q(dy) Q(W^T)^T      wgrad  dW = Q(dy^T) Q(x^T)^T

    name            fprop         dgrad, wgrad                            source
    mxfp8           E4M3          E4M3                                    arXiv:2506.08027
    mxfp4_rtn       FP4           FP4                                     control
    mxfp4_h_rtn     FP4           FP4, fixed Hadamard                     after arXiv:2605.09825
    mxfp4_rht_sr    -             FP4, random Hadamard, stochastic        arXiv:2502.20586
    quartet         FP4, QuEST    FP4, random Hadamard, stochastic        arXiv:2505.14669
    quartet_even    FP4, Hadamard as quartet                              ours
    mx8f_mx4b       E4M3          FP4, fixed Hadamard                     ours, the default
    mx8f_mx4b_sr    E4M3          FP4, random Hadamard, stochastic        ours
    mxfp4_no_wgrad  FP4           FP4, fixed Hadamard; wgrad -            ours
    nvfp4_rtn       NVFP4         NVFP4                                   control
    nvfp4_sr        NVFP4         NVFP4, dy stochastic; wgrad Hadamard    after arXiv:2509.25149

"-" is the compute dtype. Scales of FP4 are "even", under stochastic rounding "rceil"; those of E4M3
"rceil". A fixed Hadamard transform uses one draw of signs throughout, a random one draws new signs
every step. The forward pass has none: it is never random, so evaluation sees the trained model.
"""

from dataclasses import dataclass

from experiments.mxfp4.numbers.formats import FORMATS, Quantizer
from experiments.mxfp4.numbers.randomness import HADAMARD
from nanochat.settings import require_known

PRODUCTS = ("fprop", "dgrad", "wgrad")
SIGNS = ("fixed", "random", "none")
DEFAULT = "mx8f_mx4b"


@dataclass(frozen=True)
class Product:
    """Quantizers of the operands of a b^T: one format, and both transformed or neither.

    Raises  ValueError otherwise.
    """

    a: Quantizer
    b: Quantizer

    def __post_init__(self) -> None:
        if (self.a.format, self.a.hadamard) != (self.b.format, self.b.hadamard):
            raise ValueError(
                f"a product of {self.a} and {self.b} makes no sense: both operands need one "
                "format, and both the Hadamard transform or neither"
            )

    @classmethod
    def of(cls, a: str, b: str = "") -> "Product":
        """Of two quantizers as text; one text is for both."""
        return cls(Quantizer.parse(a), Quantizer.parse(b or a))

    @property
    def format(self) -> str:
        return self.a.format

    @property
    def block(self) -> int:
        """What the contracted axis must be a multiple of."""
        return HADAMARD if self.a.hadamard else FORMATS[self.format].block


@dataclass(frozen=True)
class Recipe:
    """Quantizers of the three products; None is the compute dtype.

    signs   of the Hadamard transforms in the backward pass: fixed, one draw throughout; random,
            drawn every step; or none flipped, as in the forward pass.
    quest   the forward pass as Quartet published it: scales from the standard deviation, gradients
            of clipped elements dropped, the backward pass on quantized operands. Emulated only.
    Raises  ValueError for a combination that makes no sense.
    """

    name: str
    fprop: Product | None = None
    dgrad: Product | None = None
    wgrad: Product | None = None
    signs: str = "fixed"
    quest: bool = False

    def __post_init__(self) -> None:
        backward = [p for p in (self.dgrad, self.wgrad) if p is not None]
        problem = ""
        if self.signs not in SIGNS:
            problem = f"signs are {self.signs!r}; choose one of {', '.join(SIGNS)}"
        elif self.signs == "random" and not any(p.a.hadamard for p in backward):
            problem = "random signs need a Hadamard transform in the backward pass"
        elif self.fprop and "stochastic" in (self.fprop.a.rounding, self.fprop.b.rounding):
            problem = "fprop is stochastic; the forward pass must not be random, take nearest"
        elif self.quest and (None in (self.fprop, self.dgrad, self.wgrad)):
            problem = "quest needs all three products"
        if problem:
            raise ValueError(f"recipe {self.name!r}: {problem}")

    def product(self, name: str) -> Product | None:
        """The product called "fprop", "dgrad" or "wgrad"."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}[name]

    @property
    def formats(self) -> list[str]:
        """Formats of the products, without repetition."""
        products = (self.fprop, self.dgrad, self.wgrad)
        return list(dict.fromkeys(p.format for p in products if p is not None))

    @property
    def stochastic(self) -> bool:
        """Whether anything rounds stochastically."""
        backward = [p for p in (self.dgrad, self.wgrad) if p is not None]
        return any("stochastic" in (p.a.rounding, p.b.rounding) for p in backward)


E4M3 = Product.of("mxfp8_e4m3 rceil")
FP4 = Product.of("mxfp4 even")
FP4_H = Product.of("mxfp4 even hadamard")
FP4_H_SR = Product.of("mxfp4 rceil stochastic hadamard")
NVFP4 = Product.of("nvfp4")
NVFP4_SR = Product.of("nvfp4 stochastic", "nvfp4")
NVFP4_H_SR = Product.of("nvfp4 stochastic hadamard", "nvfp4 hadamard")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("mxfp8", E4M3, E4M3, E4M3),
        Recipe("mxfp4_rtn", FP4, FP4, FP4),
        Recipe("mxfp4_h_rtn", FP4, FP4_H, FP4_H),
        Recipe("mxfp4_rht_sr", None, FP4_H_SR, FP4_H_SR, signs="random"),
        Recipe("quartet", FP4_H, FP4_H_SR, FP4_H_SR, signs="random", quest=True),
        Recipe("quartet_even", FP4_H, FP4_H_SR, FP4_H_SR, signs="random"),
        Recipe("mx8f_mx4b", E4M3, FP4_H, FP4_H),
        Recipe("mx8f_mx4b_sr", E4M3, FP4_H_SR, FP4_H_SR, signs="random"),
        Recipe("mxfp4_no_wgrad", FP4, FP4_H, None),
        Recipe("nvfp4_rtn", NVFP4, NVFP4, NVFP4),
        Recipe("nvfp4_sr", NVFP4, NVFP4_SR, NVFP4_H_SR),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError, with the nearest name, for another."""
    require_known("recipe", name, RECIPES)
    return RECIPES[name]
