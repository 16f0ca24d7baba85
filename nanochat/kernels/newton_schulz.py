"""Orthogonalise a stack of matrices: the nearest semi-orthogonal matrix, by Newton-Schulz steps.

    X = G / (||G||_F + eps);   each step   A = X X^T,   X <- a X + (b A + c A A) X
    so every singular value s goes to a s + b s^3 + c s^5, and after the last step lies near 1.

Shapes  G_LMN: (L, m, n), L independent matrices, tall ones transposed on the way; same shape out.
Dtypes  any float in and out; the steps run in compute_dtype, bfloat16 unless told otherwise.
Saves   nothing: an optimizer's operation, not differentiated.
Cost    L (4 m^2 n + 2 m^3) flops a step, m <= n.
Error   bfloat16: about 1e-2 relative to float32; a matrix of zeros stays zero.
Source  Muon: kellerjordan.github.io/posts/muon; Polar Express: arXiv:2505.16932.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload

Coefficients = tuple[tuple[float, float, float], ...]

NORM_EPS = 1e-7


def with_norm_safety(coefficients: Coefficients, safety: float) -> Coefficients:
    """Coefficients whose first step also divides by `safety`: p(s / safety), in one polynomial."""
    (a, b, c), *rest = coefficients
    return ((a / safety, b / safety**3, c / safety**5), *rest)


# Steep at 0 and not convergent: singular values end anywhere in about 0.7 to 1.2.
MUON_COEFFICIENTS: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
# One optimal polynomial a step. The published ones expect the norm to be 2 % above the Frobenius
# norm, so that rounding in bfloat16 cannot push a singular value out of their interval.
POLAR_EXPRESS_COEFFICIENTS: Coefficients = with_norm_safety(
    (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ),
    safety=1.02,
)


def reference(
    G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The definition: three batched products a step."""
    tall = G_LMN.shape[-2] > G_LMN.shape[-1]
    X = (G_LMN.mT if tall else G_LMN).to(compute_dtype)
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + NORM_EPS)
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).to(G_LMN.dtype)


def cost(
    G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
) -> Cost:
    """Three products a step, of which X X^T and A A are counted whole; X read and written."""
    L, m, n = G_LMN.shape[0], min(G_LMN.shape[-2:]), max(G_LMN.shape[-2:])
    steps = len(coefficients)
    return Cost(steps * L * (4 * m * m * n + 2 * m**3), steps * 2 * 2 * G_LMN.numel())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Coefficients]]:
    """One small square, odd wide and tall stacks, then two of d12's attention matrices."""
    for shape in ((1, 4, 4), (3, 5, 17), (2, 40, 24), (2, 768, 768)):
        yield torch.randn(shape, device=device, dtype=dtype), MUON_COEFFICIENTS


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Coefficients]:
    """One MLP matrix of every layer."""
    G_LMN = torch.randn(w.layers, w.width, 4 * w.width, device=device, dtype=dtype)
    return G_LMN, POLAR_EXPRESS_COEFFICIENTS


newton_schulz = Op("newton_schulz", reference, cost, examples, workload)
