"""The feed-forward network of the block: y = relu(x W_up^T)^2 W_down^T.

    post = relu(x W_up^T)^2;   dpre = (dy W_down) 2 relu(pre),  and relu(pre) = sqrt(post)

triton            both products with F columns end in the activation: post and dpre alone reach
                  memory, pre and dpost never do
triton_tma        the same on persistent programs, with tiles moved by TMA (SM90 and later)
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
from torch import Tensor

from nanochat.kernels.launch import Config, needs_triton, preferred
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.relu2_mlp_kernels import activated_product
from nanochat.kernels.workloads import Workload

# which of the three `auto` takes
AUTO = Config(
    "relu2_mlp.auto",
    {
        "implementation": "triton_pointwise",
        "origin": "the fused products are not measured against cuBLAS there",
    },
)


def reference(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """relu(x @ w_up.T)^2 @ w_down.T."""
    return F.linear(F.linear(x, w_up).relu().square(), w_down)


class Relu2MLP(torch.autograd.Function):
    """The network on rows (M, D); `method` says who multiplies, as in relu2_mlp_kernels."""

    @staticmethod
    def forward(ctx, x_MD, w_up, w_down, method):
        # pre is not kept: backward recovers relu(pre) = sqrt(post)
        post = activated_product(x_MD, w_up.mT, None, method)
        ctx.save_for_backward(x_MD, w_up, w_down, post)
        ctx.method = method
        return post @ w_down.mT

    @staticmethod
    def backward(ctx, dy_MD):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, w_up, w_down, post = ctx.saved_tensors
        # dpost = dy W_down, times 2 relu(pre) before it is stored
        dpre = activated_product(dy_MD, w_down, post, ctx.method)
        return dpre @ w_up, dpre.mT @ x_MD, dy_MD.mT @ post, None


def _apply(x: Tensor, w_up: Tensor, w_down: Tensor, method: str) -> Tensor:
    """Raises ValueError for operands of other shapes or of several dtypes."""
    shapes = w_up.shape == (w_up.shape[0], x.shape[-1]) and w_down.shape == w_up.shape[::-1]
    if not shapes or not x.dtype == w_up.dtype == w_down.dtype:
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (x, w_up, w_down))
        raise ValueError(
            f"relu2_mlp needs x (..., D), w_up (F, D) and w_down (D, F) of one dtype, got {got}"
        )
    return Relu2MLP.apply(x.reshape(-1, x.shape[-1]), w_up, w_down, method).view(x.shape)


def triton_fused(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`reference` with the activation at the end of the products."""
    return _apply(x, w_up, w_down, "pointer")


def triton_tma(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`triton_fused` on persistent programs, with tiles moved by TMA."""
    return _apply(x, w_up, w_down, "tma")


def triton_pointwise(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`reference` with cuBLAS products, each followed by the activation in place."""
    return _apply(x, w_up, w_down, "pointwise")


def cost(x: Tensor, w_up: Tensor, w_down: Tensor) -> Cost:
    """Two products, four backward; each tensor once, but for the activation and its gradient,
    which are written and read again (both backward, where the activation is read once)."""
    tokens, size = x.numel() // x.shape[-1], x.element_size()
    inputs, hidden = x.numel() + w_up.numel() + w_down.numel(), tokens * w_up.shape[0]
    flops = 4 * tokens * w_up.numel()
    # backward: the inputs, dy and the activation in, dpre written and read, three gradients out
    moved = 2 * inputs + x.numel() + 3 * hidden
    return Cost(flops, (inputs + x.numel() + 2 * hidden) * size, Cost(2 * flops, moved * size))


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One token, odd sizes, several tiles each way, rows of a wider tensor."""
    for rows, width, hidden in ((1, 8, 16), (5, 39, 73), (150, 104, 304)):
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


relu2_mlp = Op(
    "relu2_mlp", reference, cost, examples, workload,
    summary="keeps one tensor of 4 D a token instead of two or three; `triton` and `triton_tma` "
    "apply the activation inside the matrix products",
)  # fmt: skip
for name, call in (
    ("triton_pointwise", triton_pointwise),
    ("triton_tma", triton_tma),
    ("triton", triton_fused),
):
    relu2_mlp.add(name, call, needs_triton, preferred(AUTO, name))
