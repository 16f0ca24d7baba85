"""One step of AdamW, in place, in one pass over memory.

    m <- m + (1 - b1) (g - m);  v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - lr m' / (sqrt(v') + eps),  m' = m / (1 - b1^t), v' = v / (1 - b2^t)

Shapes  weight, gradient, exp_avg, exp_avg_sq: one shape, any, contiguous.
Dtypes  float32, as the optimizer keeps them.
Saves   nothing: an optimizer's operation, not differentiated.
Cost    28 bytes an element; operation by operation it is about 80.
Tiles   The head of d12, 65,536 x 768, is 50 million elements or 49,152 blocks of 1024. A program
        reads 4 KiB each of w, g, m and v, and writes w, m and v: 1.4 GB in all, where the
        operations of the reference move about 4 GB.
Source  arXiv:1711.05101, algorithm 2; torch.optim.AdamW, operation by operation.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.launch import Config, cdiv, launch, needs_triton, worth_compiling
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload

TILES = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
STEP = Config("adamw_step.step", TILES | {"origin": "not measured: 32 bytes a thread and tensor"})


@torch.no_grad()
def reference(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step `step` (from 1) on all four."""
    beta1, beta2 = betas
    weight.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@triton.jit
def step_kernel(
    weight_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, size,
    beta1, beta2, eps, decay, rate, root_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    # the tensors are contiguous and of one shape, so one offset serves all four
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    w = tl.load(weight_ptr + at, mask=mask, other=0.0)
    g = tl.load(gradient_ptr + at, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
    # moments; g - m before the product, as torch.lerp does, so that a constant g gives m = g
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    # bias corrections and decay are numbers of the whole step: the host put them into three factors
    w = w * decay - rate * m / (tl.sqrt(v) * root_scale + eps)
    tl.store(weight_ptr + at, w, mask=mask)
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)


@torch.library.custom_op("nanochat::adamw_step", mutates_args=("weight", "exp_avg", "exp_avg_sq"))
def fused(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    beta1: float, beta2: float, eps: float, decay: float, rate: float, root_scale: float,
) -> None:  # fmt: skip
    """decay = 1 - lr wd, rate = lr / (1 - b1^t), root_scale = 1 / sqrt(1 - b2^t)."""
    tensors = weight, gradient, exp_avg, exp_avg_sq
    for x in tensors:
        if x.dtype != torch.float32 or x.shape != weight.shape or not x.is_contiguous():
            raise ValueError(
                f"adamw_step takes four contiguous float32 tensors of one shape, not {x.dtype} "
                f"{tuple(x.shape)} beside {tuple(weight.shape)}"
            )
    options = STEP.choose(weight, weight.numel())
    grid = (cdiv(weight.numel(), options["BLOCK"]),)
    rates = beta1, beta2, eps, decay, rate, root_scale
    launch(step_kernel, grid, *tensors, weight.numel(), *rates, **options)


fused.register_fake(lambda *arguments: None)


@torch.no_grad()
def triton_step(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`reference` in one launch."""
    beta1, beta2 = betas
    decay, rate = 1 - lr * weight_decay, lr / (1 - beta1**step)
    root_scale = 1 / math.sqrt(1 - beta2**step)
    fused(weight, gradient, exp_avg, exp_avg_sq, beta1, beta2, eps, decay, rate, root_scale)


def cost(weight: Tensor, *args: Any, **kwargs: Any) -> Cost:
    """Four reads and three writes of an element, about 14 operations."""
    return Cost(14 * weight.numel(), 7 * weight.numel() * weight.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """One element, an odd shape, more than one block; always float32."""
    for step, shape in ((1, (1,)), (2, (3, 7)), (1000, (70, 130))):
        weight, gradient, exp_avg = torch.randn(3, *shape, device=device)
        rates = 0.02, (0.8, 0.95), 1e-10, 0.1
        yield weight, gradient, exp_avg, torch.rand(shape, device=device), step, *rates


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """The head."""
    weight = torch.randn(w.vocab_size, w.width, device=device)
    zeros = torch.zeros_like(weight), torch.zeros_like(weight)
    return weight, torch.randn_like(weight), *zeros, 10, 0.004, (0.8, 0.95), 1e-10, 0.0


adamw_step = Op(
    "adamw_step", reference, cost, examples, workload,
    summary="28 bytes a parameter instead of about 80",
)  # fmt: skip
adamw_step.add("triton", triton_step, needs_triton, worth_compiling)
