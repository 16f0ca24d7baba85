"""Kernels of the ReLU^2 network: a matrix product that ends in the activation, and it in place.

activated_product  c = relu(a b)^2, or given post c = (a b) 2 sqrt(post), by one of three methods:

pointer    one program a tile; any sizes and strides, masked
tma        persistent programs, tile after tile; the TMA engine of SM90 and later moves tiles while
           they multiply. It needs rows of a multiple of 16 bytes: others are copied first.
pointwise  the product is PyTorch's, a kernel follows in place

Tiles    c is 65,536 x 3072 in d12 (tokens, 4 D) with K = 768: 512 x 24 tiles of 128 x 128, each
         the sum of 12 products of 128 x 64 and 64 x 128. With GROUP = 8 the programs that run
         together walk down 8 tiles, then one to the right: 8 row blocks of a and a few column
         blocks of b, which stay in L2, instead of one row of a and all of b.
Names    M, N, K as in (M, K) (K, N) -> (M, N).
"""

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.launch import Config, cdiv, launch, multiprocessors
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.rms_norm import as_rows

ALIGNMENT = 16  # bytes: of the base and of the row stride of a matrix that TMA moves
TILE_OF_32_BITS = {
    "element_size": 4, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8,
    "num_warps": 8, "num_stages": 3, "origin": "not measured",
}  # fmt: skip
TILE = {
    "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8,
    "num_warps": 8, "num_stages": 3, "origin": "not measured: fits 99 KiB",
}  # fmt: skip
FORWARD = Config("relu2_mlp.forward", TILE_OF_32_BITS, TILE)
BACKWARD = Config("relu2_mlp.backward", TILE_OF_32_BITS, TILE)
TMA_FORWARD = Config("relu2_mlp.tma_forward", TILE_OF_32_BITS, TILE)
TMA_BACKWARD = Config("relu2_mlp.tma_backward", TILE_OF_32_BITS, TILE)
POINTWISE = Config(
    "relu2_mlp.pointwise",
    {"BLOCK": 4096, "num_warps": 8, "num_stages": 1, "origin": "not measured: 16 a thread"},
)


@triton.jit
def tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP rows of tiles share their columns of b in L2."""
    # index = (group, column, row within the group), the row fastest; the last group may be lower
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = index // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    inside = index % (GROUP * tiles_n)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def activated(x):
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a fault stays visible
    return positive * positive


@triton.jit
def differentiated(dpost, post):
    return dpost * 2.0 * tl.sqrt(post.to(tl.float32))


@triton.jit
def pointer_kernel(
    a_ptr, b_ptr, post_ptr, c_ptr, M, N, K, a_row, b_row, b_column,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    # pointers to the first block along K; the loop advances them
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * a_row + k[None, :]
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * b_row + columns.to(tl.int64)[None, :] * b_column
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # sizes need not be multiples of the tiles: what is past an edge counts as 0
    for start in range(0, K, BLOCK_K):
        a_mask = (rows[:, None] < M) & (k[None, :] < K - start)
        b_mask = (k[:, None] < K - start) & (columns[None, :] < N)
        a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_row
    # the activation on the float32 sums: the product itself never reaches memory
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    if BACKWARD:
        c = differentiated(accumulator, tl.load(post_ptr + at, mask=mask, other=0.0))
    else:
        c = activated(accumulator)
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tma_kernel(
    a_desc, b_desc, post_desc, c_desc, M, N, K,
    B_TRANSPOSED: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # flattened with the loop over k: the loads of the next tile start before this one is stored
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_of(index, M, N, BLOCK_M, BLOCK_N, GROUP)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([row, k])
            b = b_desc.load([column, k]).T if B_TRANSPOSED else b_desc.load([k, column])
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        # stored by halves: each stages its tile in half the shared memory
        halves = tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_N // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        _finish(left, post_desc, c_desc, row, column, BACKWARD)
        _finish(right, post_desc, c_desc, row, column + BLOCK_N // 2, BACKWARD)


@triton.jit
def _finish(product, post_desc, c_desc, row, column, BACKWARD: tl.constexpr):
    c = differentiated(product, post_desc.load([row, column])) if BACKWARD else activated(product)
    c_desc.store([row, column], c.to(c_desc.dtype))


@triton.jit
def pointwise_kernel(x_ptr, post_ptr, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    # in place: a program reads what it overwrites, and nobody else touches it
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if BACKWARD:
        y = differentiated(x, tl.load(post_ptr + at, mask=at < size, other=0.0))
    else:
        y = activated(x)
    tl.store(x_ptr + at, y.to(x_ptr.dtype.element_ty), mask=at < size)


@torch.library.custom_op("nanochat::relu2_product", mutates_args=())
def relu2_product(a_MK: Tensor, b_KN: Tensor, post_MN: Tensor | None, tma: bool) -> Tensor:
    """relu(a b)^2, or with post (a b) 2 sqrt(post), (M, N) contiguous; operands of any strides."""
    product = _tma_product if tma else _pointer_product
    return product(a_MK, b_KN, post_MN)


def _pointer_product(a: Tensor, b: Tensor, post: Tensor | None) -> Tensor:
    a, post = as_rows(a), None if post is None else post.contiguous()
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), dtype=a.dtype, device=a.device)
    options = (FORWARD if post is None else BACKWARD).choose(a, K)
    grid = (cdiv(M, options["BLOCK_M"]) * cdiv(N, options["BLOCK_N"]),)
    launch(
        pointer_kernel, grid, a, b, post, c, M, N, K, a.stride(0), *b.stride(),
        BACKWARD=post is not None, PRECISION=_precision(a), **options,
    )  # fmt: skip
    return c


def _tma_product(a: Tensor, b: Tensor, post: Tensor | None) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    transposed = b.stride(0) == 1
    a, b = aligned(a), aligned(b.mT if transposed else b)
    c = aligned(torch.empty((M, N), dtype=a.dtype, device=a.device))
    options = (TMA_FORWARD if post is None else TMA_BACKWARD).choose(a, K)
    block_m, block_n, block_k = (options[f"BLOCK_{axis}"] for axis in "MNK")
    b_block = [block_n, block_k] if transposed else [block_k, block_n]
    c_block = [block_m, block_n // 2]
    # One persistent program a multiprocessor: its tiles take all of the shared memory. A second one
    # would follow the first, over tiles whose neighbours have left L2.
    launch(
        tma_kernel, (min(multiprocessors(a.device), cdiv(M, block_m) * cdiv(N, block_n)),),
        descriptor(a, [block_m, block_k]),
        descriptor(b, b_block),
        None if post is None else descriptor(aligned(post), c_block),
        descriptor(c, c_block),
        M, N, K, B_TRANSPOSED=transposed, BACKWARD=post is not None, PRECISION=_precision(a),
        **options,
    )  # fmt: skip
    return c.contiguous()


def descriptor(x: Tensor, block: list[int]) -> Any:
    """What the TMA engine is told of a matrix."""
    return triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(x, block)


def _precision(x: Tensor) -> str | None:
    return "ieee" if x.dtype == torch.float32 else None  # tf32 would keep 10 bits


def aligned(x: Tensor) -> Tensor:
    """A matrix that TMA can move: x itself, or a copy with wider rows."""
    unit = ALIGNMENT // x.element_size()
    rows, width = x.shape
    is_aligned = x.data_ptr() % ALIGNMENT == 0 and x.stride(0) % unit == 0
    if is_aligned and x.stride(1) == 1 and x.stride(0) >= width:
        return x
    wide = torch.empty((rows, cdiv(width, unit) * unit), dtype=x.dtype, device=x.device)
    return wide[:, :width].copy_(x)


@relu2_product.register_fake
def _(a_MK: Tensor, b_KN: Tensor, post_MN: Tensor | None, tma: bool) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])


@torch.library.custom_op("nanochat::relu2_", mutates_args=("x",))
def relu2_(x: Tensor, post: Tensor | None) -> None:
    """In place on a contiguous x: relu(x)^2, or with post x 2 sqrt(post)."""
    assert x.is_contiguous()
    options = POINTWISE.choose(x, x.shape[-1])
    grid = (cdiv(x.numel(), options["BLOCK"]),)
    aux = None if post is None else post.contiguous()
    launch(pointwise_kernel, grid, x, aux, x.numel(), BACKWARD=post is not None, **options)


@relu2_.register_fake
def _(x: Tensor, post: Tensor | None) -> None:
    return None


def activated_product(a_MK: Tensor, b_KN: Tensor, post_MN: Tensor | None, method: str) -> Tensor:
    """relu(a b)^2, or with post (a b) 2 sqrt(post), contiguous; `method` as at the top."""
    if method != "pointwise":
        return relu2_product(a_MK, b_KN, post_MN, method == "tma")
    c = a_MK @ b_KN
    relu2_(c, post_MN)
    return c
