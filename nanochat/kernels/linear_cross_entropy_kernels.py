"""Losses of rows of logits, and the gradients of those logits in their place.

    r = (1 - tanh(x / softcap)) / 2 = 1 / (1 + exp(2 x / softcap))
    z - softcap = -2 softcap r,   dz/dx = 1 - tanh^2 = 4 r (1 - r)

    Sums are of exp(z - softcap): |z| <= softcap, so no running maximum is needed, and z itself,
    whose digits cancel near 0, is never computed.

Shapes  logits: (rows, padded V), of which V columns are real; targets, scales, losses: (rows,).
Dtypes  float32, bfloat16, float16; losses in float32, dlogits rounded to the dtype of the logits.
Cost    a logit is read once and written once, for two exponentials and a reciprocal, by
        row_kernel (bfloat16, V <= 65,536); read twice, for four and two, by loss_kernel (the rest).
Error   a target outside the vocabulary that is not ignore_index makes a loss of NaN; row_kernel
        rounds dlogits to bfloat16 twice (1.4 times the error of one rounding).
Rows    row_kernel gives a row of 65,536 logits to 1024 threads. Each keeps 64 of them, as the
        bfloat16 pairs exp(z - softcap) r (1 - r), in 32 of its 64 registers until the sum over the
        row is known: 128 KB, half of a multiprocessor's registers.
Source  gradients over the logits: Liger Kernel, arXiv:2410.10989; z-loss: PaLM, arXiv:2204.02311.
"""

import torch
from torch import Tensor

from nanochat.kernels.launch import Config, launch
from nanochat.kernels.optional_triton import tl, triton

# exp(-2 softcap), the least term of a sum, is a normal float32 (above 1.2e-38) up to here
MAX_SOFTCAP = 40.0
LOG2_E = tl.constexpr(1.4426950408889634)
LOSS = Config(
    "linear_cross_entropy.loss",
    # two blocks an SM, whose rows (35 MB on 132 SMs) an L2 cache keeps between their two passes
    {"BLOCK": 8192, "num_warps": 16, "num_stages": 1, "origin": "not measured: rows stay in L2"},
)
# 64 logits a thread at most: 128 a thread would need all 64 registers that 1024 threads have each
ROW = Config(
    "linear_cross_entropy.row",
    {"up_to": 8192, "BLOCK": 1024, "num_warps": 4, "origin": "not measured: 32 registers a row"},
    {"up_to": 16_384, "BLOCK": 1024, "num_warps": 8, "origin": "not measured: the same"},
    {"up_to": 32_768, "BLOCK": 2048, "num_warps": 16, "origin": "not measured: the same"},
    {"up_to": 65_536, "BLOCK": 2048, "num_warps": 32, "origin": "not measured: no spills"},
)
MAX_ROW = 65_536
RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
PACK_BFLOAT16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@triton.jit
def half_below(x, softcap):
    """r: half of how far tanh(x / softcap) is below 1."""
    y = 1.0 + tl.exp2(x * (2.0 * LOG2_E / softcap))
    # one instruction, to 1 ulp: a division adds four to it, for operands near the ends of float32
    return tl.inline_asm_elementwise(
        RECIPROCAL,  # pyright: ignore[reportArgumentType]
        "=r,r", [y], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def target_of(row, logits_ptr, targets_ptr, V):
    """The target of a row, whether it is in the vocabulary, and its logit.

    Read before the row is overwritten: the sum over the row is a barrier between the two. A target
    outside the vocabulary becomes NaN, where reading past the row would return any number.
    """
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    at_target = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    return target, known, at_target


@triton.jit
def loss_kernel(
    logits_ptr, targets_ptr, scales_ptr, losses_ptr, softcap, z_loss, row_stride, ignored,
    V: tl.constexpr, PADDED: tl.constexpr,
    GRADIENTS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row of logits; with GRADIENTS the row becomes its dlogits, times its scale."""
    # one program takes one row: 65,536 logits in 8 blocks of 8192
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target, _known, at_target = target_of(row, logits_ptr, targets_ptr, V)  # pyright: ignore[reportGeneralTypeIssues]
    valid = target != ignored
    # first pass: the sum of exp(z - softcap). Every lane keeps its own sum until the end.
    exponent = -2.0 * LOG2_E * softcap
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
        sums += tl.where(column < V, tl.exp2(exponent * half_below(x, softcap)), 0.0)
    # the loss: lse - z at the target, both measured from softcap so that nothing cancels
    total = tl.sum(sums, axis=0)
    log_total = tl.log(total)
    lse = log_total + softcap
    loss = log_total + 2.0 * softcap * half_below(at_target, softcap) + z_loss * lse * lse
    tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))
    # Second pass: dlogits over the logits. 4 is that of 4 r (1 - r), taken out of the loop with the
    # row's other factors; an ignored row has factor 0 and so stores zeros.
    if GRADIENTS:
        scale = 4.0
        if SCALED:
            scale *= tl.load(scales_ptr + row)
        scale = tl.where(valid, scale, 0.0)
        per_exp = scale * (1.0 + 2.0 * z_loss * lse) / total
        # up to PADDED: columns of padding get 0, because the products that follow read them
        for start in range(0, PADDED, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            r = half_below(x, softcap)
            d = per_exp * tl.exp2(exponent * r) - tl.where(column == target, scale, 0.0)
            d = tl.where(column < V, d * (r * (1.0 - r)), 0.0)
            tl.store(logits_ptr + column, d.to(logits_ptr.dtype.element_ty), mask=column < PADDED)


@triton.jit
def terms(logits_ptr, column, softcap, V, WHOLE: tl.constexpr):
    """exp(z - softcap), and that times r (1 - r), of a block of logits; 0 from column V on."""
    if WHOLE:
        x = tl.load(logits_ptr + column).to(tl.float32)
    else:
        x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    r = half_below(x, softcap)
    e = tl.exp2(-2.0 * LOG2_E * softcap * r)
    if not WHOLE:
        e = tl.where(column < V, e, 0.0)
    return e, e * (r * (1.0 - r))


@triton.jit
def store(row_ptr, column, values, V, WHOLE: tl.constexpr):
    """Round a block to bfloat16 and store what lies before column V."""
    if WHOLE:
        tl.store(row_ptr + column, values.to(tl.bfloat16))
    else:
        tl.store(row_ptr + column, values.to(tl.bfloat16), mask=column < V)


@triton.jit
def row_kernel(
    logits_ptr, targets_ptr, scales_ptr, losses_ptr, softcap, z_loss, row_stride, ignored,
    V: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row of bfloat16 logits, which becomes its dlogits, times its scale."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target, known, at_target = target_of(row, logits_ptr, targets_ptr, V)  # pyright: ignore[reportGeneralTypeIssues]
    valid = target != ignored
    # All of the row at once, two blocks a turn: one lends the low halves of the registers that are
    # kept, the other the high ones. The loop is unrolled, so only the last blocks need masks.
    column = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    kept = ()
    for start in tl.static_range(0, PADDED, 2 * BLOCK):
        e_low, d_low = terms(logits_ptr, start + column, softcap, V, start + BLOCK <= V)
        e_high, d_high = terms(
            logits_ptr, start + BLOCK + column, softcap, V, start + 2 * BLOCK <= V
        )
        sums += e_low + e_high
        pair = tl.inline_asm_elementwise(
            PACK_BFLOAT16,  # pyright: ignore[reportArgumentType]
            "=r,r,r", [d_low, d_high], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
        kept = kept + (pair,)  # noqa: RUF005 - Triton does not unpack
    # the loss, as in loss_kernel
    total = tl.sum(sums, axis=0)
    log_total = tl.log(total)
    lse = log_total + softcap
    r = half_below(at_target, softcap)
    loss = log_total + 2.0 * softcap * r + z_loss * lse * lse
    tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))
    # dlogits from the registers: a shift or a mask and one product each
    scale = 4.0
    if SCALED:
        scale *= tl.load(scales_ptr + row)
    scale = tl.where(valid, scale, 0.0)
    per_exp = scale * (1.0 + 2.0 * z_loss * lse) / total
    for start in tl.static_range(0, PADDED, 2 * BLOCK):
        pair = kept[start // (2 * BLOCK)]
        d_low = (pair << 16).to(tl.float32, bitcast=True) * per_exp
        d_high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True) * per_exp
        store(logits_ptr, start + column, d_low, PADDED, start + BLOCK <= PADDED)
        store(logits_ptr, start + BLOCK + column, d_high, PADDED, start + 2 * BLOCK <= PADDED)
    # The target's own has another term. It is written over what another thread has just stored:
    # after a barrier, instead of a comparison for each of the 65,536.
    tl.debug_barrier()
    d = per_exp * tl.exp2(-2.0 * LOG2_E * softcap * r) - scale
    tl.store(logits_ptr + target, (d * (r * (1.0 - r))).to(tl.bfloat16), mask=known)


def launch_losses(
    logits: Tensor, targets: Tensor, scales: Tensor | None, losses: Tensor, softcap: float,
    z_loss: float, ignored: int, V: int, gradients: bool,
) -> None:  # fmt: skip
    """Losses of rows of logits (rows, padded V); with `gradients` the logits become dlogits."""
    padded = logits.shape[1]
    grid = (logits.shape[0],)
    scaled = losses if scales is None else scales
    arguments = (logits, targets, scaled, losses, softcap, z_loss, logits.stride(0), ignored)
    constants = {"V": V, "PADDED": padded, "SCALED": scales is not None}
    if gradients and logits.dtype == torch.bfloat16 and padded <= MAX_ROW:
        launch(row_kernel, grid, *arguments, **constants, **ROW.choose(logits, padded))
    else:
        options = LOSS.choose(logits, padded)
        launch(loss_kernel, grid, *arguments, **constants, GRADIENTS=gradients, **options)
