"""Head and loss a chunk of rows at a time: logits, dlogits and their two products in one buffer.

Shapes  x: (N, D); weight: (V, D), of which vocab_size rows are real; targets, scales: (N,).
Dtypes  float32, bfloat16, float16; losses and dW in float32, dx in the dtype of x.
Saves   nothing; the logits of `chunk_rows` rows are in memory, their dlogits in the same place.
Chunks  65,536 tokens and a vocabulary of 65,536 in bfloat16 would be 8.6 GB of logits. 9 chunks of
        up to 7552 rows share one buffer of 0.99 GB: x W^T goes into it, a kernel turns logits
        into dlogits in place, two products take dx and dW from there, the next overwrites it.
Source  Liger Kernel, arXiv:2410.10989.
"""

import torch
from torch import Tensor

from nanochat.kernels.launch import Config
from nanochat.kernels.linear_cross_entropy_kernels import launch_losses

IGNORE_INDEX = -1
CHUNK = Config(
    "linear_cross_entropy.chunk",
    {"megabytes": 1000, "origin": "1.5 GB extra in all at d20 with 65,536 tokens"},
)
SMALL_CHUNK = Config(
    "linear_cross_entropy.small_chunk",
    {"megabytes": 140, "origin": "0.65 GB extra in all at d20 with 65,536 tokens"},
)


def chunk_rows(x_ND: Tensor, V: int, small: bool) -> int:
    """Rows whose logits are in memory at once: few where `small`, so many that products are fast
    and dW is summed in few passes otherwise.

    As many as the bytes of the configuration hold, a multiple of 128: in 1000 MB, 7552 of 128 KB.
    """
    config = SMALL_CHUNK if small else CHUNK
    megabytes = config.choose(x_ND, V)["megabytes"]
    return max(128, int(megabytes * 1e6 / (V * x_ND.element_size())) // 128 * 128)


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


def _accumulate(dw: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """dw += dlogits^T x, summed in float32; the `first` product replaces what dw holds."""
    beta = 0 if first else 1
    if x.dtype == torch.float32:
        dw.addmm_(dlogits.mT, x, beta=beta)
    elif x.device.type == "cuda":  # cuBLAS multiplies 16-bit matrices into a float32 one
        torch.addmm(dw, dlogits.mT, x, beta=beta, out_dtype=torch.float32, out=dw)
    else:
        dw.addmm_(dlogits.mT.float(), x.float(), beta=beta)


@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def chunked(
    x_ND: Tensor,
    weight: Tensor,
    targets_N: Tensor,
    scales_N: Tensor | None,
    softcap: float,
    vocab_size: int,
    z_loss: float,
    ignore_index: int,
    gradients: bool,
    small: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) in float32; with `gradients` also dx and dW of the sum of scale * loss, else
    empty tensors. A scale of None is 1; `small` as in `chunk_rows`."""
    (N, D), V = x_ND.shape, weight.shape[0]
    rows = min(chunk_rows(x_ND, V, small), max(N, 1))
    targets_N = targets_N.contiguous()
    losses = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    dx = torch.empty((N, D) if gradients else (0,), dtype=x_ND.dtype, device=x_ND.device)
    make = torch.empty if N else torch.zeros  # the first chunk writes it
    dw = make((V, D) if gradients else (0,), dtype=torch.float32, device=x_ND.device)
    buffer = torch.empty((rows, V), dtype=x_ND.dtype, device=x_ND.device)
    scales_N = None if scales_N is None else scales_N.contiguous()
    # each chunk: logits, losses and dlogits in the same buffer, then its share of dx and dW
    for start in range(0, N, rows):
        x = x_ND[start : start + rows]
        logits = torch.mm(x, weight.mT, out=buffer[: len(x)])
        part = slice(start, start + len(x))
        launch_losses(
            logits, targets_N[part], None if scales_N is None else scales_N[part], losses[part],
            softcap, z_loss, ignore_index, vocab_size, gradients,
        )  # fmt: skip
        if gradients:
            torch.mm(logits, weight, out=dx[part])
            _accumulate(dw, logits, x, start == 0)
    return losses, dx, dw


@chunked.register_fake
def _(
    x_ND: Tensor, weight: Tensor, targets_N: Tensor, scales_N: Tensor | None, softcap: float,
    vocab_size: int, z_loss: float, ignore_index: int, gradients: bool, small: bool,
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
