"""Device functions that quantize a tile held in registers and store its codes and scales.

They compute what `reference.quantize` computes, bit for bit. A quantizer reaches them as the tuple
of constants Q that `constants_of` makes.

A tile of 64 x 128 in MXFP4, blocks of 32 along its columns, step by step in `store_quantized`:

    x            (64, 128)    float32
    blocks       (64, 4, 32)  the same registers, four blocks a row
    largest      (64, 4)      bits of the largest magnitude of each block
    bytes_       (64, 4)      E8M0 bytes, stored swizzled
    y            (64, 128)    x divided by its block's scale: within [-6, 6], or saturated there
    even, odd    (64, 64)     neighbours that share a byte
    codes        (64, 64)     bytes, odd in the high nibble
"""

from typing import Any

from experiments.mxfp4.numbers.formats import FORMATS, Quantizer
from nanochat.kernels.launch import GENERIC
from nanochat.kernels.optional_triton import tl, triton

INFINITY_BITS = tl.constexpr(0x7F800000)
SIGN_BIT = tl.constexpr(-0x80000000)
E8M0_NAN = tl.constexpr(255)
E4M3_NAN = tl.constexpr(0x7F)
E4M3_TINY = tl.constexpr(2.0**-6)
ROOT = tl.constexpr(32**-0.5)
E2M1_CAPABILITY = 100  # cvt to E2M1 is an instruction from sm_100 on
# Four pairs at a time, a byte each, the even element low: inline assembly cannot return less than
# 32 bits without waste.
CVT_E2M1 = tl.constexpr(
    "{ .reg .b8 a, b, c, d;"
    " cvt.rn.satfinite.e2m1x2.f32 a, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;"
    " cvt.rn.satfinite.e2m1x2.f32 c, $7, $3; cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;"
    " mov.b32 $0, {a, b, c, d}; }"
)


def has_e2m1_conversion(architecture: str) -> bool:
    """Whether PTX of "sm_..." converts to E2M1. Elsewhere integers do the same."""
    if architecture == GENERIC:
        return False
    return int(architecture.removeprefix("sm_")) >= E2M1_CAPABILITY


def constants_of(text: str) -> tuple[Any, ...] | None:
    """Q of the quantizer that `str` wrote as `text`; None for no quantizer."""
    if not text:
        return None
    q = Quantizer.parse(text)
    fmt = FORMATS[q.format]
    half_of_last_bit = 1 << 22 - fmt.mantissa_bits  # of a mantissa of 23 bits
    return (
        fmt.element, fmt.scale, fmt.block, fmt.elements_per_byte, fmt.exponent,
        half_of_last_bit, fmt.largest_mantissa,
        q.scale_mode, q.rounding == "stochastic", q.hadamard,
    )  # fmt: skip


@triton.jit
def largest_bits(blocks):
    """float32 bits of the largest magnitude along the last axis: NaN and infinity exceed all."""
    # as integers: floats of one sign sort like their bits, and a maximum of floats would drop NaN
    return tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)


@triton.jit
def e8m0_scale(largest, Q: tl.constexpr):
    """Byte of the power-of-two scale, and its reciprocal."""
    EXPONENT: tl.constexpr = Q[4]
    HALF_OF_LAST_BIT: tl.constexpr = Q[5]
    LARGEST_MANTISSA: tl.constexpr = Q[6]
    MODE: tl.constexpr = Q[7]
    # The bits of a float32 are sign, exponent in 8 bits, mantissa in 23. Shifted right by 23 only
    # the exponent is left, biased by 127 like E8M0: no logarithm, no rounding of one.
    if MODE == "even":  # a carry out of the mantissa makes the exponent one larger
        exponent = (largest + HALF_OF_LAST_BIT) >> 23
    elif MODE == "rceil":
        exponent = (largest >> 23) + ((largest & 0x7FFFFF) > LARGEST_MANTISSA).to(tl.int32)
    else:
        exponent = largest >> 23
    exponent = tl.maximum(exponent - EXPONENT, 0)
    byte = tl.where(largest >= INFINITY_BITS, E8M0_NAN, exponent)
    # 2^(127 - byte) is made of its bits: exact, and a multiplication is cheaper than a division
    return byte.to(tl.uint8), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_scale(largest, tensor_scale):
    """Bits of the E4M3 scale of a block, and the reciprocal of block scale times tensor scale."""
    # div_rn: Triton's `/` may be approximate, and then codes would differ from the reference
    wanted = tl.div_rn(tl.div_rn(largest.to(tl.float32, bitcast=True), 6.0), tensor_scale)
    wanted = tl.minimum(tl.maximum(wanted, E4M3_TINY), 448.0)
    rounded = wanted.to(tl.float8e4nv)
    reciprocal = tl.div_rn(tl.div_rn(1.0, tensor_scale), rounded.to(tl.float32))
    bits = rounded.to(tl.uint8, bitcast=True)
    return tl.where(largest >= INFINITY_BITS, E4M3_NAN, bits).to(tl.uint8), reciprocal


@triton.jit
def magnitude_of(y):
    return (y.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def dithered(y, bits):
    """y moved within half a step of E2M1: rounding it to nearest rounds y stochastically."""
    magnitude = tl.minimum(magnitude_of(y), 6.0)
    # the distance of E2M1 neighbours, and where it begins: 0.5 from 0, 1 from 2, 2 from 4
    step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
    first = tl.where(magnitude < 2.0, 0.0, tl.where(magnitude < 4.0, 2.0, 4.0))
    # 16 bits become a number in (-0.5, 0.5), symmetric about 0; 2^-16 as a literal
    offset = (bits.to(tl.int32).to(tl.float32) + 0.5) * 0.0000152587890625 - 0.5
    moved = tl.maximum(magnitude + offset * step, first).to(tl.int32, bitcast=True)
    return (moved | (y.to(tl.int32, bitcast=True) & SIGN_BIT)).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_code(y):
    """Code 0..15 in an int32: adding 2^23 steps leaves the rounded multiple in the last bits.

    From 2^23 on float32 holds whole numbers only, so the addition itself rounds to nearest even:
    1.3 in steps of 0.5 is 2.6 steps; 1.3 + 2^22 rounds to 2^22 + 3 x 0.5, whose last bits are 3,
    and code 3 is 1.5.
    """
    magnitude = tl.minimum(magnitude_of(y), 6.0)
    big = tl.where(magnitude < 2.0, 4194304.0, tl.where(magnitude < 4.0, 8388608.0, 16777216.0))
    first = tl.where(magnitude < 2.0, 0, tl.where(magnitude < 4.0, 2, 4))
    code = ((magnitude + big).to(tl.int32, bitcast=True) & 7) + first
    return code | ((y.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_pairs(even, odd, PTX: tl.constexpr):
    """A byte for each pair of values."""
    if PTX:
        return tl.inline_asm_elementwise(
            CVT_E2M1,  # pyright: ignore[reportArgumentType]
            "=r,f,f,f,f,f,f,f,f", [even, odd], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    return (e2m1_code(even) | (e2m1_code(odd) << 4)).to(tl.uint8)


@triton.jit
def random_words(row, column, columns, seed, stream, TRANSPOSED: tl.constexpr,
                 R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(R, C / 2) words, one for each pair of elements of the tile at (row, column)."""
    # One call of Philox serves eight neighbours of a row of the whole matrix, so the bits of an
    # element depend on its place in the matrix, not on the tile that happens to hold it.
    calls = (row + tl.arange(0, R)).to(tl.int64)[:, None] * (columns // 8)
    calls += column // 8 + tl.arange(0, C // 8)[None, :]
    low = (calls & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    high, stream = (calls >> 32).to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, stream, zero + TRANSPOSED)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, C // 2))


@triton.jit
def hadamard(x, signs_ptr, R: tl.constexpr, C: tl.constexpr):
    """Each 32 columns of the tile times diag(+-1) H / sqrt(32)."""
    # Entry (i, j) is -1 to the number of bits that i and j share; folding the five bits of i & j
    # onto the last leaves the parity of that number there. No table is loaded.
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    common = i & j
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    if signs_ptr is not None:  # channel i is negated: its row of the matrix is
        common ^= (tl.load(signs_ptr) >> i).to(tl.int32)
    matrix = (1 - 2 * (common & 1)).to(tl.float32).to(tl.bfloat16)
    blocks = tl.reshape(x.to(tl.bfloat16), (R * C // 32, 32))
    return tl.reshape(tl.dot(blocks, matrix) * ROOT, (R, C))


@triton.jit
def store_scales(bytes_, scales_ptr, row, block, rows, blocks, R: tl.constexpr, B: tl.constexpr):
    """Swizzled as in `layout`; the padding of the last tiles of scales becomes 0."""
    # Row 37, block 6 of a matrix with 8 blocks a row, so 2 tiles a row: tile 0 x 2 + 1, and in it
    # byte (37 % 32) x 16 + (37 // 32) x 4 + 6 % 4 = 86. Together byte 512 + 86 = 598.
    r, b = row + tl.arange(0, R)[:, None], block + tl.arange(0, B)[None, :]
    scale_tiles = tl.cdiv(blocks, 4)
    tile = (r // 128).to(tl.int64) * scale_tiles + b // 4
    at = tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + b % 4
    bytes_ = tl.where((r < rows) & (b < blocks), bytes_, 0)
    tl.store(scales_ptr + at, bytes_, mask=(r < tl.cdiv(rows, 128) * 128) & (b < scale_tiles * 4))


@triton.jit
def store_quantized(
    x, codes_ptr, scales_ptr, tensor_scale_ptr, seed_ptr, signs_ptr, stream,
    row, column, rows, columns,
    Q: tl.constexpr, TRANSPOSED: tl.constexpr, PTX: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Quantize the tile x (R, C) float32 at (row, column) of a matrix (rows, columns).

    Elements outside the matrix must be 0.
    """
    ELEMENT: tl.constexpr = Q[0]
    SCALE: tl.constexpr = Q[1]
    BLOCK: tl.constexpr = Q[2]
    PER_BYTE: tl.constexpr = Q[3]
    STOCHASTIC: tl.constexpr = Q[8]
    HADAMARD: tl.constexpr = Q[9]
    # 1. transform, so that no element of a block is much larger than the others
    if HADAMARD:
        x = hadamard(x, signs_ptr, R, C)
    # 2. a scale for each block, from its largest magnitude
    blocks = tl.reshape(x, (R, C // BLOCK, BLOCK))
    largest = largest_bits(blocks)
    if SCALE == "e4m3":
        bytes_, reciprocal = e4m3_scale(largest, tl.load(tensor_scale_ptr))
    else:
        bytes_, reciprocal = e8m0_scale(largest, Q)
    store_scales(bytes_, scales_ptr, row, column // BLOCK, rows, columns // BLOCK, R, C // BLOCK)
    # 3. elements in units of their scale, rounded to codes
    y = tl.reshape(blocks * reciprocal[:, :, None], (R, C))
    if ELEMENT == "e2m1":
        even, odd = tl.split(tl.reshape(y, (R, C // 2, 2)))
        if STOCHASTIC:
            seed = tl.load(seed_ptr)
            words = random_words(row, column, columns, seed, stream, TRANSPOSED, R, C)
            even, odd = dithered(even, words & 0xFFFF), dithered(odd, words >> 16)
        codes = e2m1_pairs(even, odd, PTX)
    elif ELEMENT == "e4m3":
        codes = tl.clamp(y, -448.0, 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = tl.clamp(y, -57344.0, 57344.0).to(tl.float8e5).to(tl.uint8, bitcast=True)
    # 4. codes; what lies outside the matrix was quantized too, and is not stored
    r = row + tl.arange(0, R)[:, None]
    c = column // PER_BYTE + tl.arange(0, C // PER_BYTE)[None, :]
    at = r.to(tl.int64) * (columns // PER_BYTE) + c
    tl.store(codes_ptr + at, codes, mask=(r < rows) & (c < columns // PER_BYTE))
