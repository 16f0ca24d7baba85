"""The feed-forward network of the block: y = relu(x W_up^T)^2 W_down^T.

    post = relu(x W_up^T)^2;   dpre = (dy W_down) 2 relu(pre),  and relu(pre) = sqrt(post)

triton            both products with F columns end in the activation: post and dpre alone reach
                  memory, pre and dpost never do
triton_pointwise  cuBLAS products, each followed by a kernel that works in place

Shapes  x: (..., D); w_up: (F, D); w_down: (D, F); y: (..., D). F = 4 D in the model.
Dtypes  float32, bfloat16, float16; products accumulate in float32.
Saves   x, both weights and post: one tensor of F a token where the reference keeps three.
Cost    4 D F flops a token; backward twice that.
Error   sqrt of a rounded square is within the rounding of pre (1.7e-3 at most in bfloat16); below
        |pre| = 1e-19, or 2.4e-4 in float16, post and with it the gradient is 0.
Source  ReLU^2: D. So et al., Primer, arXiv:2109.08668.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.launch import cdiv, config, launch, needs_triton, preferred
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.rms_norm import as_rows
from nanochat.kernels.workloads import Workload


def reference(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """relu(x @ w_up.T)^2 @ w_down.T."""
    return F.linear(F.linear(x, w_up).relu().square(), w_down)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, post_ptr, c_ptr, M, N, K, a_row, b_row, b_column,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c = relu(a b)^2, or with BACKWARD c = (a b) 2 sqrt(post); b is (K, N) by its strides."""
    # GROUP rows of tiles side by side share their columns of b in the L2 cache
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    rows = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * a_row + k[None, :]
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * b_row + columns.to(tl.int64)[None, :] * b_column
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a_mask = (rows[:, None] < M) & (k[None, :] < K - start)
        b_mask = (k[:, None] < K - start) & (columns[None, :] < N)
        a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_row
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    if BACKWARD:
        post = tl.load(post_ptr + at, mask=mask, other=0.0).to(tl.float32)
        c = accumulator * 2.0 * tl.sqrt(post)
    else:
        positive = tl.maximum(accumulator, 0.0)
        c = positive * positive
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activation_kernel(x_ptr, post_ptr, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """In place: x = relu(x)^2, or with BACKWARD x = x 2 sqrt(post)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if BACKWARD:
        x *= 2.0 * tl.sqrt(tl.load(post_ptr + at, mask=at < size, other=0.0).to(tl.float32))
    else:
        x = tl.maximum(x, 0.0)
        x *= x
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < size)


@torch.library.custom_op("nanochat::relu2_product", mutates_args=())
def relu2_product(a_MK: Tensor, b_KN: Tensor, post_MN: Tensor | None) -> Tensor:
    """relu(a b)^2, or with post (a b) 2 sqrt(post), (M, N) contiguous; b of any strides."""
    a, post = as_rows(a_MK), None if post_MN is None else post_MN.contiguous()
    (M, K), N = a.shape, b_KN.shape[1]
    c = torch.empty((M, N), dtype=a.dtype, device=a.device)
    options = config(f"relu2_mlp.{'forward' if post is None else 'backward'}", a, K)
    grid = (cdiv(M, options["BLOCK_M"]) * cdiv(N, options["BLOCK_N"]),)
    launch(
        product_kernel, grid, a, b_KN, c if post is None else post, c,
        M, N, K, a.stride(0), *b_KN.stride(), BACKWARD=post is not None,
        PRECISION="ieee" if a.dtype == torch.float32 else None, **options,
    )  # fmt: skip
    return c


@relu2_product.register_fake
def _(a_MK: Tensor, b_KN: Tensor, post_MN: Tensor | None) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])


@torch.library.custom_op("nanochat::relu2_", mutates_args=("x",))
def relu2_(x: Tensor, post: Tensor | None) -> None:
    """In place on a contiguous x: relu(x)^2, or with post x 2 sqrt(post)."""
    assert x.is_contiguous()
    options = config("relu2_mlp.pointwise", x, x.shape[-1])
    grid = (cdiv(x.numel(), options["BLOCK"]),)
    aux = x if post is None else post.contiguous()
    launch(activation_kernel, grid, x, aux, x.numel(), BACKWARD=post is not None, **options)


@relu2_.register_fake
def _(x: Tensor, post: Tensor | None) -> None:
    return None


class Relu2MLP(torch.autograd.Function):
    """The network on rows (M, D); `fused` decides who multiplies."""

    @staticmethod
    def forward(ctx, x_MD, w_up, w_down, fused):
        if fused:
            post = relu2_product(x_MD, w_up.mT, None)
        else:
            post = x_MD @ w_up.mT
            relu2_(post, None)
        ctx.save_for_backward(x_MD, w_up, w_down, post)
        ctx.fused = fused
        return post @ w_down.mT

    @staticmethod
    def backward(ctx, dy_MD):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, w_up, w_down, post = ctx.saved_tensors
        if ctx.fused:
            dpre = relu2_product(dy_MD, w_down, post)
        else:
            dpre = dy_MD @ w_down
            relu2_(dpre, post)
        return dpre @ w_up, dpre.mT @ x_MD, dy_MD.mT @ post, None


def triton_fused(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`reference` with the activation at the end of the products."""
    return Relu2MLP.apply(x.flatten(0, -2), w_up, w_down, True).view(x.shape)


def triton_pointwise(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`reference` with the activation in place behind cuBLAS."""
    return Relu2MLP.apply(x.flatten(0, -2), w_up, w_down, False).view(x.shape)


def cost(x: Tensor, w_up: Tensor, w_down: Tensor) -> Cost:
    """Forward: two matrix products; x, both weights and y once, the activation written and read."""
    tokens = x.numel() // x.shape[-1]
    elements = 2 * x.numel() + w_up.numel() + w_down.numel() + 2 * tokens * w_up.shape[0]
    return Cost(4 * tokens * w_up.numel(), elements * x.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One token, odd sizes, several tiles each way, rows of a wider tensor."""
    for rows, width, hidden in ((1, 8, 16), (5, 40, 72), (150, 100, 300)):
        yield (
            torch.randn(rows, width, device=device, dtype=dtype),
            torch.randn(hidden, width, device=device, dtype=dtype) * width**-0.5,
            torch.randn(width, hidden, device=device, dtype=dtype) * hidden**-0.5,
        )

    wide = torch.randn(2, 9, 50, device=device, dtype=dtype)
    weights = torch.randn(64, 32, device=device, dtype=dtype) * 32**-0.5
    yield wide[..., 7:39], weights, torch.randn_like(weights).mT.contiguous()


def workload(
    w: Workload, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The network of one block."""
    return (
        torch.randn(w.tokens, w.width, device=device, dtype=dtype),
        torch.randn(4 * w.width, w.width, device=device, dtype=dtype) * w.width**-0.5,
        torch.randn(w.width, 4 * w.width, device=device, dtype=dtype) * (4 * w.width) ** -0.5,
    )


relu2_mlp = Op("relu2_mlp", reference, cost, examples, workload)
relu2_mlp.add(
    "triton_pointwise", triton_pointwise, needs_triton, preferred("relu2_mlp", "triton_pointwise")
)
relu2_mlp.add("triton", triton_fused, needs_triton, preferred("relu2_mlp", "triton"))
