"""Losses of rows of logits and their gradients, a chunk of rows at a time in one buffer.

    r = (1 - tanh(x / softcap)) / 2 = 1 / (1 + exp(2 x / softcap))
    z - softcap = -2 softcap r,   dz/dx = 1 - tanh^2 = 4 r (1 - r)

    Sums are of exp(z - softcap): |z| <= softcap, so no running maximum is needed, and z itself,
    whose digits cancel near 0, is never computed.

Shapes  x: (N, D); weight: (V, D), of which vocab_size rows are real; targets, scales: (N,).
Dtypes  float32, bfloat16, float16; losses and dW in float32, dlogits rounded to the dtype of x.
Saves   nothing; the logits of `chunk_rows` rows are in memory, their dlogits in the same place.
Cost    a logit is read twice and written once; six exponentials and reciprocals.
Error   a target outside the vocabulary that is not IGNORE_INDEX makes a loss of NaN.
Chunks  65,536 tokens and a vocabulary of 65,536 in bfloat16 would be 8.6 GB of logits. 16 chunks
        of 4096 rows share one buffer of 0.54 GB: x W^T goes into it, loss_kernel turns logits into
        dlogits in place, two products take dx and dW from there, the next chunk overwrites it.
Source  chunks: Liger Kernel, arXiv:2410.10989; z-loss: PaLM, arXiv:2204.02311, section 5.
"""

import torch
from torch import Tensor

from nanochat.kernels.launch import Config, launch
from nanochat.kernels.optional_triton import tl, triton

IGNORE_INDEX = -1
# exp(-2 softcap), the least term of a sum, is a normal float32 (above 1.2e-38) up to here
MAX_SOFTCAP = 40.0
LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK = Config(
    "linear_cross_entropy.chunk",
    {"element_size": 4, "rows": 2048, "origin": "0.5 GB of logits at a vocabulary of 65,536"},
    {"rows": 4096, "origin": "0.5 GB of logits at a vocabulary of 65,536"},
)
SMALL_CHUNK = Config(
    "linear_cross_entropy.small_chunk",
    {"element_size": 4, "rows": 512, "origin": "0.13 GB of logits at a vocabulary of 65,536"},
    {"rows": 1024, "origin": "0.13 GB of logits at a vocabulary of 65,536"},
)
LOSS = Config(
    "linear_cross_entropy.loss",
    # two blocks an SM, whose rows (35 MB on 132 SMs) an L2 cache keeps between their two passes
    {"BLOCK": 8192, "num_warps": 16, "num_stages": 1, "origin": "not measured: rows stay in L2"},
)


@triton.jit
def half_below(x, softcap):
    """r: half of how far tanh(x / softcap) is below 1."""
    return 1.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E / softcap)))


@triton.jit
def loss_kernel(
    logits_ptr, targets_ptr, scales_ptr, losses_ptr, softcap, z_loss, row_stride,
    V: tl.constexpr, PADDED: tl.constexpr, IGNORED: tl.constexpr,
    GRADIENTS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row of logits; with GRADIENTS the row becomes its dlogits, times its scale."""
    # one program takes one row: 65,536 logits in 8 blocks of 8192
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    valid = target != IGNORED
    # Read before the row is overwritten: the sum below is a barrier between the two. A target
    # outside the vocabulary becomes NaN, where reading past the row would return any number.
    known = (target >= 0) & (target < V)
    at_target = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
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


def chunk_rows(x_ND: Tensor, small: bool) -> int:
    """Rows whose logits are in memory at once: few where `small`, so many that products are fast
    otherwise."""
    config = SMALL_CHUNK if small else CHUNK
    return config.choose(x_ND, x_ND.shape[-1])["rows"]


def extra_bytes(
    tokens: int, D: int, V: int, rows: int, element_size: int, recomputed: bool = False
) -> int:
    """Most memory that the loss and its gradients take at once beyond the inputs, in bytes.

    First it is the logits of a chunk beside dx, dW and the losses; then dx and dW beside those that
    are returned: multiplied by the gradient of the loss, or, where the logits are `recomputed` in
    the backward pass, dW rounded to the dtype of the weight.
    """
    dx, dw = tokens * D * element_size, V * D * element_size
    in_chunks = rows * V * element_size + (8 if recomputed else 4) * tokens
    return dx + V * D * 4 + max(in_chunks, dw if recomputed else dx + dw)


def _accumulate(dw: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """dw += dlogits^T x, summed in float32."""
    if x.dtype == torch.float32:
        dw.addmm_(dlogits.mT, x)
    elif x.device.type == "cuda":  # cuBLAS multiplies 16-bit matrices into a float32 one
        torch.addmm(dw, dlogits.mT, x, out_dtype=torch.float32, out=dw)
    else:
        dw.addmm_(dlogits.mT.float(), x.float())


@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def chunked(
    x_ND: Tensor,
    weight: Tensor,
    targets_N: Tensor,
    scales_N: Tensor | None,
    softcap: float,
    vocab_size: int,
    z_loss: float,
    gradients: bool,
    small: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) in float32; with `gradients` also dx and dW of the sum of scale * loss, else
    empty tensors. A scale of None is 1; `small` as in `chunk_rows`."""
    (N, D), V = x_ND.shape, weight.shape[0]
    rows = min(chunk_rows(x_ND, small), max(N, 1))
    targets_N = targets_N.contiguous()
    losses = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    dx = torch.empty((N, D) if gradients else (0,), dtype=x_ND.dtype, device=x_ND.device)
    dw = torch.zeros((V, D) if gradients else (0,), dtype=torch.float32, device=x_ND.device)
    buffer = torch.empty((rows, V), dtype=x_ND.dtype, device=x_ND.device)
    scales_N = losses if scales_N is None else scales_N.contiguous()
    options = LOSS.choose(x_ND, V)
    # each chunk: logits, losses and dlogits in the same buffer, then its share of dx and dW
    for start in range(0, N, rows):
        x = x_ND[start : start + rows]
        logits = torch.mm(x, weight.mT, out=buffer[: len(x)])
        part = slice(start, start + len(x))
        launch(
            loss_kernel, (len(x),), logits, targets_N[part], scales_N[part], losses[part],
            softcap, z_loss, V, V=vocab_size, PADDED=V, IGNORED=IGNORE_INDEX, GRADIENTS=gradients,
            SCALED=scales_N is not losses, **options,
        )  # fmt: skip
        if gradients:
            torch.mm(logits, weight, out=dx[part])
            _accumulate(dw, logits, x)
    return losses, dx, dw


@chunked.register_fake
def _(
    x_ND: Tensor, weight: Tensor, targets_N: Tensor, scales_N: Tensor | None, softcap: float,
    vocab_size: int, z_loss: float, gradients: bool, small: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    losses = x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)
    dx = x_ND.new_empty(x_ND.shape if gradients else (0,))
    dw_shape = weight.shape if gradients else (0,)
    return losses, dx, x_ND.new_empty(dw_shape, dtype=torch.float32)


@torch.library.custom_op("nanochat::times", mutates_args=())
def times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a float32 factor of one element, rounded once to dtype, without a float32 copy."""
    # of shape (1,): a tensor without axes would be rounded to the 16-bit dtype of x first
    return torch.mul(x, factor.view(1), out=torch.empty(x.shape, dtype=dtype, device=x.device))


@times.register_fake
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
