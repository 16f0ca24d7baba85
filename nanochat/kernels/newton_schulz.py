"""Orthogonalise a stack of matrices: the nearest semi-orthogonal matrix, by Newton-Schulz steps.

    X = G / (||G||_F + eps);   each step   A = X X^T,   X <- a X + (b A + c A A) X
    so every singular value s goes to a s + b s^3 + c s^5, and after the last step lies near 1.

    A, b A + c A A and their products are symmetric: one kernel computes their lower triangles and
    mirrors them. The Gram form steps on R = X X^T and an accumulated Q instead of X,
        Z = a I + b R + c R R,   R <- Z R Z,   Q <- Z Q,   and at the end X <- Q X,
    which needs two m x m x n products in all, three with the restart that rounding makes necessary.

Shapes  G_LMN: (L, m, n), L independent matrices, tall ones transposed on the way; same shape out.
Dtypes  any float in and out; the steps run in compute_dtype, bfloat16 by default.
Saves   nothing: an optimizer's operation, not differentiated.
Cost    L (4 m^2 n + 2 m^3) flops a step, m <= n; symmetric L (3 m^2 n + m^3); Gram about
        L (6 m^2 n + 14 m^3) for five steps.
Error   bfloat16: about 1e-2 relative to float32; a matrix of zeros stays zero. The Gram form
        diverges in bfloat16: it runs in float16.
Tiles   A symmetric product of m = 1280 rows has 10 x 10 tiles of 128, of which 55 are on or below
        the diagonal. Program 7 computes tile (3, 1) and stores it twice: as it is, and transposed
        as tile (1, 3).
Source  Muon: kellerjordan.github.io/posts/muon; Polar Express: arXiv:2505.16932;
        Gram Newton-Schulz: dao-lab.ai/blog/2026/gram-newton-schulz.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat.kernels.launch import Config, cdiv, launch, needs_triton, worth_compiling
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload

Coefficients = tuple[tuple[float, float, float], ...]

NORM_EPS = 1e-7
GRAM_RESTART = 3  # steps after which Q X is formed and R computed from it again
GRAM_ASPECT = 2  # n >= 2 m: below, R and Q cost more than X

PIPELINE = {"BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
PRODUCT = Config(
    "newton_schulz.symmetric_product",
    {"element_size": 4, "BLOCK_M": 64, "origin": "not measured"} | PIPELINE,
    {"BLOCK_M": 128, "origin": "not measured: fits 99 KiB"} | PIPELINE,
)


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


def normalised(G_LMN: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """G in compute_dtype, wide, each matrix divided by its Frobenius norm.

    float16 is rounded to last: a gradient of 1e-8 is a subnormal of it and one of 1e5 its infinity,
    where the quotient is neither. bfloat16 has the range of float32 and is rounded to first, as in
    torch.optim.Muon: half the bytes to read.
    """
    wide = G_LMN.mT if G_LMN.shape[-2] > G_LMN.shape[-1] else G_LMN
    X = wide.float() if compute_dtype == torch.float16 else wide.to(compute_dtype)
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + NORM_EPS)
    return X.to(compute_dtype)


def _as_given(X: Tensor, G_LMN: Tensor) -> Tensor:
    return (X if X.shape == G_LMN.shape else X.mT).to(G_LMN.dtype)


@torch.no_grad()
def reference(
    G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The definition: three batched products a step."""
    X = normalised(G_LMN, compute_dtype)
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return _as_given(X, G_LMN)


@triton.jit
def symmetric_product_kernel(
    a_ptr, b_ptr, d_ptr, c_ptr, alpha, beta, diagonal, M, K,
    a_batch, a_row, b_batch, b_row, d_batch, d_row,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # which tile: programs count the lower triangle row by row, 0 | 1 2 | 3 4 5 | ...
    pid = tl.program_id(0)
    # row of the pid-th tile of a lower triangle; the root may be off by one at whole squares
    i = ((tl.sqrt(8.0 * pid + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > pid, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= pid, i + 1, i)
    j = pid - i * (i + 1) // 2
    # the rows of a and of b whose products make the tile: b enters transposed, row by row as a does
    batch = tl.program_id(1).to(tl.int64)
    rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + batch * a_batch + rows.to(tl.int64)[:, None] * a_row + k[None, :]
    b_ptrs = b_ptr + batch * b_batch + columns.to(tl.int64)[:, None] * b_row + k[None, :]
    # along K, masked at its end: what lies past it must not multiply
    accumulator = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a_mask = (rows[:, None] < M) & (k[None, :] < K - start)
        b_mask = (columns[:, None] < M) & (k[None, :] < K - start)
        a = tl.load(a_ptrs + start, mask=a_mask, other=0.0)
        b = tl.load(b_ptrs + start, mask=b_mask, other=0.0)
        accumulator = tl.dot(a, b.T, accumulator, input_precision=PRECISION)
    # alpha a b^T + beta d + diagonal I, in float32, rounded once
    mask = (rows[:, None] < M) & (columns[None, :] < M)
    c = alpha * accumulator
    if ADD:
        d_ptr += batch * d_batch + rows.to(tl.int64)[:, None] * d_row + columns[None, :]
        c += beta * tl.load(d_ptr, mask=mask, other=0.0).to(tl.float32)
    c += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    c = c.to(c_ptr.dtype.element_ty)
    c_ptr += batch * M * M
    tl.store(c_ptr + rows.to(tl.int64)[:, None] * M + columns[None, :], c, mask=mask)
    # the mirror image of the tile; tiles on the diagonal are their own
    if i != j:
        mirrored = c_ptr + columns.to(tl.int64)[:, None] * M + rows[None, :]
        tl.store(mirrored, c.T, mask=(columns[:, None] < M) & (rows[None, :] < M))


@torch.library.custom_op("nanochat::symmetric_product", mutates_args=())
def symmetric_product(
    A_LMK: Tensor, B_LMK: Tensor, D_LMM: Tensor | None, alpha: float, beta: float, diagonal: float
) -> Tensor:
    """alpha A B^T + beta D + diagonal I (L, m, m), where that is symmetric: half the work."""
    A, B = (x if x.stride(-1) == 1 else x.contiguous() for x in (A_LMK, B_LMK))
    D = A if D_LMM is None else D_LMM.contiguous()
    L, M, K = A.shape
    C = torch.empty((L, M, M), dtype=A.dtype, device=A.device)
    options = PRODUCT.choose(A, M)
    tiles = cdiv(M, options["BLOCK_M"])
    strides = A.stride()[:2] + B.stride()[:2] + D.stride()[:2]
    launch(
        symmetric_product_kernel, (tiles * (tiles + 1) // 2, L),
        A, B, D, C, alpha, beta, diagonal, M, K, *strides,
        ADD=D_LMM is not None, PRECISION="ieee" if A.dtype == torch.float32 else None, **options,
    )  # fmt: skip
    return C


@symmetric_product.register_fake
def _(
    A_LMK: Tensor, B_LMK: Tensor, D_LMM: Tensor | None, alpha: float, beta: float, diagonal: float
) -> Tensor:
    L, M, _ = A_LMK.shape
    return A_LMK.new_empty(L, M, M)


@torch.no_grad()
def triton_symmetric(
    G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`reference` with half of X X^T and of A A left out."""
    X = normalised(G_LMN, compute_dtype)
    for a, b, c in coefficients:
        A = symmetric_product(X, X, None, 1.0, 0.0, 0.0)
        B = symmetric_product(A, A, A, c, b, 0.0)
        X = torch.baddbmm(X, B, X, beta=a)
    return _as_given(X, G_LMN)


@torch.no_grad()
def triton_gram(
    G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The Gram form for matrices at least twice as long as wide, `triton_symmetric` for others.

    bfloat16 steps are taken in float16.
    """
    m, n = min(G_LMN.shape[-2:]), max(G_LMN.shape[-2:])
    if n < GRAM_ASPECT * m:
        return triton_symmetric(G_LMN, coefficients, compute_dtype)
    dtype = torch.float16 if compute_dtype == torch.bfloat16 else compute_dtype
    X = normalised(G_LMN, dtype)
    for start in range(0, len(coefficients), GRAM_RESTART):
        X = _accumulated(X, coefficients[start : start + GRAM_RESTART]) @ X
    return _as_given(X, G_LMN)


def _accumulated(X: Tensor, coefficients: Coefficients) -> Tensor:
    """Q (L, m, m) with Q X the result of the steps."""
    R = symmetric_product(X, X, None, 1.0, 0.0, 0.0)
    Q = None
    for index, (a, b, c) in enumerate(coefficients):
        Z = symmetric_product(R, R, R, c, b, a)
        Q = Z if Q is None else symmetric_product(Z, Q, None, 1.0, 0.0, 0.0)
        if index + 1 < len(coefficients):
            ZR = symmetric_product(Z, R, None, 1.0, 0.0, 0.0)
            R = symmetric_product(ZR, Z, None, 1.0, 0.0, 0.0)
    assert Q is not None
    return Q


def cost(
    G_LMN: Tensor, coefficients: Coefficients, compute_dtype: torch.dtype = torch.bfloat16
) -> Cost:
    """Three products a step, of which X X^T and A A are counted whole; X read and written."""
    L, m, n = G_LMN.shape[0], min(G_LMN.shape[-2:]), max(G_LMN.shape[-2:])
    steps = len(coefficients)
    return Cost(steps * L * (4 * m * m * n + 2 * m**3), steps * 2 * 2 * G_LMN.numel())


def examples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Coefficients, torch.dtype]]:
    """One small square, odd wide and tall stacks, more tiles than one, strided matrices."""
    for shape in ((1, 4, 4), (3, 5, 17), (2, 40, 24), (1, 150, 310)):
        yield torch.randn(shape, device=device, dtype=dtype), MUON_COEFFICIENTS, dtype
    yield torch.randn(3, 20, 50, device=device, dtype=dtype).mT, POLAR_EXPRESS_COEFFICIENTS, dtype


def workload(
    w: Workload, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Coefficients, torch.dtype]:
    """One MLP matrix of every layer, in float32 as gradients are; steps in `dtype`."""
    G_LMN = torch.randn(w.layers, w.width, 4 * w.width, device=device)
    return G_LMN, MUON_COEFFICIENTS, dtype


def other_rounding(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why `auto` does not choose the Gram form."""
    return "rounds differently from the definition, in float16"


newton_schulz = Op(
    "newton_schulz", reference, cost, examples, workload,
    summary="lower triangles of symmetric products only; `triton_gram` steps on X X^T in float16",
)  # fmt: skip
newton_schulz.add("triton_gram", triton_gram, needs_triton, other_rounding, error=4.0)
newton_schulz.add("triton", triton_symmetric, needs_triton, worth_compiling)
