"""Other libraries' versions of our operations, called as our operations are.

A loader imports the library and returns the callable; ImportError says that it is not installed.
Where a library has nothing that computes the operation, the table says why. torch's own attention
and the flash-attention packages are implementations of our registry, not peers.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.linear_cross_entropy import IGNORE_INDEX
from nanochat.kernels.newton_schulz import NORM_EPS, Coefficients
from nanochat.kernels.rms_norm import EPS

Loader = Callable[[], Callable[..., Any]]
LIGER_ROPE = "liger rotates its inputs in place, the other way round, and has no norm in it"


class MisfitError(ValueError):
    """The library's function does not compute the operation with these arguments."""


@functools.cache
def _constant(value: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """A tensor that a library asks for, and that would otherwise be made again in every call."""
    return torch.full(shape, value, dtype=dtype, device=device)


def _liger() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def liger_rms_norm() -> Callable[..., Any]:
    """Liger's RMSNorm without weight, not reusing the memory of the incoming gradient."""
    liger = _liger()
    return lambda x: liger.liger_rms_norm(x, None, EPS, 0.0, "gemma", False)


def liger_add_rms_norm() -> Callable[..., Any]:
    """Liger's fused addition and RMSNorm; it demands a weight: ones, without a gradient."""
    liger = _liger()

    def call(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        weight = _constant(1.0, x.shape[-1:], x.dtype, x.device)
        y, total = liger.liger_fused_add_rms_norm(x, delta, weight, EPS, 0.0, "gemma", False)
        return total, y

    return call


def liger_relu2_mlp() -> Callable[..., Any]:
    """Liger's pointwise ReLU^2 between two matrix products."""
    liger = _liger()
    return lambda x, w_up, w_down: F.linear(liger.liger_relu_squared(F.linear(x, w_up)), w_down)


def liger_linear_cross_entropy() -> Callable[..., Any]:
    """Liger's fused linear cross-entropy with softcap, accumulating dW in float32."""
    liger = _liger()

    def call(
        x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 15.0, vocab_size: int = 0
    ) -> Tensor:
        if vocab_size not in (0, weight.shape[0]):
            raise MisfitError("liger has no padded vocabulary")
        return liger.liger_fused_linear_cross_entropy(
            x,
            weight,
            targets,
            ignore_index=IGNORE_INDEX,
            softcap=softcap,
            accum_dtype=torch.float32,
        )

    return call


def quack_rms_norm() -> Callable[..., Any]:
    """QuACK's RMSNorm on CuTe."""
    quack = importlib.import_module("quack.rmsnorm")
    return lambda x: quack.rmsnorm(x, eps=EPS)


def quack_add_rms_norm() -> Callable[..., Any]:
    """QuACK's RMSNorm with the residual addition before it."""
    quack = importlib.import_module("quack.rmsnorm")

    def call(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        y, total = quack.rmsnorm(x, residual=delta, residual_dtype=x.dtype, eps=EPS, prenorm=True)
        return total, y

    return call


def quack_relu2_mlp() -> Callable[..., Any]:
    """QuACK's MLP: ReLU^2 in the epilogues of its own matrix products."""
    quack = importlib.import_module("quack.mlp")
    return lambda x, w_up, w_down: quack.mlp_func(x, w_up, w_down, "relu_sq")


def torch_muon() -> Callable[..., Any]:
    """The orthogonalisation inside torch.optim.Muon, matrix by matrix."""
    orthogonalise = importlib.import_module("torch.optim._muon")._zeropower_via_newtonschulz

    def call(
        G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        if len(set(coefficients)) > 1:
            raise MisfitError("torch.optim.Muon repeats one triple of coefficients")
        if compute_dtype != torch.bfloat16:
            raise MisfitError("torch.optim.Muon computes in bfloat16")
        steps = len(coefficients)
        out = [orthogonalise(G, coefficients[0], steps, NORM_EPS) for G in G_LMN]
        return torch.stack(out).to(G_LMN.dtype)

    return call


def gram_newton_schulz() -> Callable[..., Any]:
    """The gram-newton-schulz package, on QuACK's kernels, compiled with CUDA graphs as it ships."""
    package = importlib.import_module("gram_newton_schulz")

    @functools.cache
    def built(coefficients: Coefficients) -> Callable[[Tensor], Tensor]:
        return package.GramNewtonSchulz(ns_coefficients=[list(abc) for abc in coefficients])

    return lambda G_LMN, coefficients, compute_dtype=None: built(coefficients)(G_LMN)


def torch_fused_adamw() -> Callable[..., Any]:
    """The step inside torch.optim.AdamW(fused=True)."""

    def call(weight, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
        torch._fused_adamw_(
            *([weight], [gradient], [exp_avg], [exp_avg_sq], []),
            [_constant(float(step), (), torch.float32, weight.device)],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return call


# operation -> peer -> loader, or why there is none
PEERS: dict[str, dict[str, Loader | str]] = {
    "adamw_step": {"torch_fused": torch_fused_adamw},
    "rms_norm": {"liger": liger_rms_norm, "quack": quack_rms_norm},
    "add_rms_norm": {"liger": liger_add_rms_norm, "quack": quack_add_rms_norm},
    "norm_rope": {"liger": LIGER_ROPE},
    "qk_norm_rope": {"liger": LIGER_ROPE},
    "relu2_mlp": {"liger": liger_relu2_mlp, "quack": quack_relu2_mlp},
    "linear_cross_entropy": {
        "liger": liger_linear_cross_entropy,
        "quack": "quack's linear cross-entropy has no softcap",
    },
    "newton_schulz": {"torch_muon": torch_muon, "gram_newton_schulz": gram_newton_schulz},
}
