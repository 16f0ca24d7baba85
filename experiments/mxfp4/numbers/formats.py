"""Block-scaled number formats, how a matrix is quantized to one, and what comes out.

    name         element  block  scale           bits an element
    mxfp4        E2M1     32     E8M0            4.25
    mxfp8_e4m3   E4M3     32     E8M0            8.25
    mxfp8_e5m2   E5M2     32     E8M0            8.25
    nvfp4        E2M1     16     E4M3, one float32 for the whole tensor    4.5

Blocks lie along the last axis, the one that a product contracts. Elements round to nearest, ties to
the even code, and saturate. The E8M0 scale 2^(byte - 127) of a block with largest magnitude m is,
with e the exponent of the largest element (2 for E2M1):

    floor   2^(floor(log2 m) - e): the rule of the specification; m may saturate
    rceil   the smallest power of two with m / scale within range: nothing saturates
    even    floor, of m rounded to the mantissa of an element: least error of the three

By hand: a block of 32 that begins 0.7, -2.6, 11, 0.1 and is 0 from there on, to mxfp4.

    largest   11 = 1.375 x 2^3, so the scale is 2^(3 - 2) = 2 by all three rules: byte 128
    scaled    0.35  -1.3   5.5   0.05
    E2M1      0.5   -1.5   6     0        the nearest of 0 0.5 1 1.5 2 3 4 6
    codes     1     11     7     0        sign in bit 3, then two bits of exponent, one of mantissa
    stored    0xB1, 0x07, fourteen times 0x00, and the scale byte: 17 bytes, 4.25 bits an element
    values    1     -3     12    0        codes times 2

The rules differ where the largest is more than 6 / 4 of its power of two. With 13 in place of 11,
floor and even keep the scale 2 and saturate 6.5 at 6 (value 12), rceil takes 4 and rounds 3.25 to 3
(12 too). With 15, floor saturates 7.5 (12), rceil and even take 4 and round 3.75 to 4 (value 16).

Source  OCP Microscaling Formats v1.0, sections 5.2 and 6.3; rceil: PTX cvt.rp.ue8m0x2; NVFP4:
        NVIDIA, Pretraining LLMs with NVFP4, arXiv:2509.25149.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.mxfp4.numbers.randomness import HADAMARD

SCALE_MODES = ("floor", "rceil", "even")
ROUNDINGS = ("nearest", "stochastic")
# word of a quantizer's text -> its field
FIELD_OF: dict[str, str] = {
    **dict.fromkeys(SCALE_MODES, "scale_mode"),
    **dict.fromkeys(ROUNDINGS, "rounding"),
    "hadamard": "hadamard",
}
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E5M2_MAX = 57_344.0


@dataclass(frozen=True)
class Format:
    """Element type, block and scale type of a number format.

    exponent       of the largest element
    mantissa_bits  of an element
    """

    name: str
    element: str
    element_max: float
    exponent: int
    mantissa_bits: int
    block: int = 32
    scale: str = "e8m0"

    @property
    def element_bits(self) -> int:
        return 4 if self.element == "e2m1" else 8

    @property
    def elements_per_byte(self) -> int:
        return 8 // self.element_bits

    @property
    def largest_mantissa(self) -> int:
        """Mantissa of the largest element, as the 23 bits of a float32 have it."""
        return int((self.element_max / 2**self.exponent - 1) * 2**23)

    @property
    def bits(self) -> float:
        """Bits an element, its share of the block's scale included."""
        return self.element_bits + 8 / self.block


FORMATS = {
    f.name: f
    for f in (
        Format("mxfp4", "e2m1", E2M1_MAX, 2, 1),
        Format("mxfp8_e4m3", "e4m3", E4M3_MAX, 8, 3),
        Format("mxfp8_e5m2", "e5m2", E5M2_MAX, 15, 2),
        Format("nvfp4", "e2m1", E2M1_MAX, 2, 1, block=16, scale="e4m3"),
    )
}


@dataclass(frozen=True)
class Quantizer:
    """How one operand of a product is quantized.

    scale_mode  "floor", "rceil" or "even"; nvfp4 ignores it.
    rounding    "nearest" or "stochastic"; the second for 4-bit elements only, and in mxfp4 only
                where nothing saturates: what is clipped is biased.
    hadamard    transform every 32 channels first; both operands of a product, or neither.
    Raises      ValueError for an unknown name or a combination that makes no sense.
    """

    format: str = "mxfp4"
    scale_mode: str = "even"
    rounding: str = "nearest"
    hadamard: bool = False

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("format", self.format, tuple(FORMATS)),
            ("scale_mode", self.scale_mode, SCALE_MODES),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{what} is {value!r}; choose one of {', '.join(allowed)}")
        if self.rounding == "stochastic":
            if FORMATS[self.format].element != "e2m1":
                raise ValueError(f"{self.format} rounds to nearest; take rounding='nearest'")
            if self.format == "mxfp4" and self.scale_mode != "rceil":
                raise ValueError(
                    f"stochastic rounding with scale_mode={self.scale_mode!r} is biased: it clips "
                    "the largest elements; take scale_mode='rceil'"
                )

    def __str__(self) -> str:
        words = [self.format, self.scale_mode, self.rounding, "hadamard" * self.hadamard]
        return " ".join(filter(None, words))

    @classmethod
    def parse(cls, text: str) -> "Quantizer":
        """The quantizer that `str` wrote: a format, then words in any order, or their defaults."""
        name, *words = text.split()
        fields: dict[str, Any] = {"format": name}
        for word in words:
            if word not in FIELD_OF:
                known = ", ".join(FIELD_OF)
                raise ValueError(f"{word!r} is no part of a quantizer; known: {known}")
            fields[FIELD_OF[word]] = word
        return cls(**fields | {"hadamard": "hadamard" in words})


@dataclass(frozen=True)
class ScaledTensor:
    """A matrix (rows, columns) in a block-scaled format; blocks lie along the columns.

    codes         uint8: (rows, columns / 2) of two nibbles, or (rows, columns) of FP8 bits
    scales        uint8, `layout.swizzled_shape(rows, columns / block)`
    tensor_scale  float32 (), nvfp4 only
    """

    codes: Tensor
    scales: Tensor
    format: str
    columns: int
    tensor_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns


def check_matrix(x: Tensor, quantizer: Quantizer) -> None:
    """Raise ValueError unless the last axis of the matrix x divides into whole blocks."""
    block = HADAMARD if quantizer.hadamard else FORMATS[quantizer.format].block
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"needs a floating-point matrix, got {tuple(x.shape)} {x.dtype}")
    if x.shape[1] == 0 or x.shape[1] % block:
        raise ValueError(
            f"{x.shape[1]} columns do not divide into blocks of {block}: pad the contracted axis "
            f"with zeros to {max(1, -(-x.shape[1] // block)) * block}, or leave this matrix in "
            "bfloat16"
        )
