"""Kernels of c = a b^T in block-scaled formats, with an epilogue: store, add, or activate.

A program multiplies one tile of c, or with split-K one share of its blocks along K. Scales come in
the swizzled layout that tensor cores read: 512 contiguous bytes for 128 rows and 4 blocks.

One step along K of a tile 128 x 128 x 256 in MXFP4 reads

    a, b                (128, 128)  bytes: 256 codes of 4 bits in each row
    a_scales, b_scales  (128, 8)    bytes: one for 32 codes, out of two tiles of 512 bytes

and adds 128 x 128 x 256 products of two elements and their two scales to float32 sums.
"""

from experiments.mxfp4.kernels.blocks import store_quantized
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.relu2_mlp_kernels import activated, tile_of

E2M1 = tl.constexpr("e2m1")
E4M3 = tl.constexpr("e4m3")
E5M2 = tl.constexpr("e5m2")


@triton.jit
def load_codes(ptr, row, k, rows, stride, EVEN_K: tl.constexpr,
               BLOCK_ROWS: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    """(BLOCK_ROWS, BYTES) of codes from byte k of each row.

    Rows past the last one repeat it: their products are never stored, and no mask is needed.
    """
    r = tl.minimum(row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)[:, None]
    byte = k + tl.arange(0, BYTES)[None, :]
    if EVEN_K:
        return tl.load(ptr + r * stride + byte)
    return tl.load(ptr + r * stride + byte, mask=byte < stride, other=0)


@triton.jit
def load_scales(ptr, row, block, rows, scale_tiles, SCALE: tl.constexpr, EVEN_K: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """(BLOCK_ROWS, BLOCKS) scales out of swizzled tiles, `scale_tiles` of them in a row."""
    DOWN: tl.constexpr = BLOCK_ROWS // 128
    ALONG: tl.constexpr = BLOCKS // 4
    i = tl.minimum(row // 128 + tl.arange(0, DOWN), tl.cdiv(rows, 128) - 1)
    i = i.to(tl.int64)[:, None, None]
    j = block // 4 + tl.arange(0, ALONG)[None, :, None]
    at = (i * scale_tiles + j) * 512 + tl.arange(0, 512)[None, None, :]
    tiles = tl.load(ptr + at) if EVEN_K else tl.load(ptr + at, mask=j < scale_tiles, other=0)
    # the inverse of `layout.swizzle_scales`: in a tile, row r is at (r % 32, r // 32)
    tiles = tl.reshape(tiles, (DOWN, ALONG, 32, 4, 4))
    scales = tl.reshape(tl.permute(tiles, (0, 3, 2, 1, 4)), (BLOCK_ROWS, BLOCKS))
    return scales.to(tl.float8e4nv, bitcast=True) if SCALE == "e4m3" else scales


@triton.jit
def dot(a, a_scales, b, b_scales, accumulator, ELEMENT: tl.constexpr):
    """accumulator + a b^T; the element type must be a global constant for the interpreter."""
    if ELEMENT == "e4m3":
        accumulator = tl.dot_scaled(a, a_scales, E4M3, b.T, b_scales, E4M3, accumulator)
    elif ELEMENT == "e5m2":
        accumulator = tl.dot_scaled(a, a_scales, E5M2, b.T, b_scales, E5M2, accumulator)
    else:
        accumulator = tl.dot_scaled(a, a_scales, E2M1, b.T, b_scales, E2M1, accumulator)
    return accumulator


@triton.jit
def matmul_kernel(
    a_ptr, a_scales_ptr, a_tensor_scale_ptr, b_ptr, b_scales_ptr, b_tensor_scale_ptr,
    out_ptr, codes_ptr, scales_ptr, M, N, K, stride, scale_tiles, k_per_split,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, SCALE_BLOCK: tl.constexpr, PER_BYTE: tl.constexpr,
    EPILOGUE: tl.constexpr, Q: tl.constexpr, PTX: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of c = a b^T.

    EPILOGUE     "store": out = c; "add": out += c; "relu2": codes, scales = Q(relu(c)^2), and out
                 if given
    SCALE_BLOCK  elements that share a scale
    EVEN_K       K is a multiple of BLOCK_K: loads need no mask
    """
    BYTES: tl.constexpr = BLOCK_K // PER_BYTE
    BLOCKS: tl.constexpr = BLOCK_K // SCALE_BLOCK
    # neighbouring programs share columns of b in L2: `tile_of` walks GROUP rows of tiles at a time
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    first = tl.program_id(1) * k_per_split
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(first, min(K, first + k_per_split), BLOCK_K):
        a = load_codes(a_ptr, row, k // PER_BYTE, M, stride, EVEN_K, BLOCK_M, BYTES)
        b = load_codes(b_ptr, column, k // PER_BYTE, N, stride, EVEN_K, BLOCK_N, BYTES)
        block = k // SCALE_BLOCK
        a_scales = load_scales(
            a_scales_ptr, row, block, M, scale_tiles, SCALE, EVEN_K, BLOCK_M, BLOCKS
        )
        b_scales = load_scales(
            b_scales_ptr, column, block, N, scale_tiles, SCALE, EVEN_K, BLOCK_N, BLOCKS
        )
        accumulator = dot(a, a_scales, b, b_scales, accumulator, ELEMENT)
    if SCALE == "e4m3":  # nvfp4: the scales of a and b as a whole, one multiplication at the end
        accumulator *= tl.load(a_tensor_scale_ptr) * tl.load(b_tensor_scale_ptr)
    # With split-K, part s of the sums goes to rows s M to (s + 1) M of out; `sum_kernel` adds them.
    r = row + tl.arange(0, BLOCK_M)[:, None]
    c = column + tl.arange(0, BLOCK_N)[None, :]
    mask = (r < M) & (c < N)
    at = (tl.program_id(1).to(tl.int64) * M + r) * N + c
    if EPILOGUE == "relu2":
        post = activated(accumulator).to(tl.bfloat16)
        if out_ptr is not None:
            tl.store(out_ptr + at, post, mask=mask)
        # zeros outside c: they must not become the largest magnitude of a block
        store_quantized(
            tl.where(mask, post.to(tl.float32), 0.0), codes_ptr, scales_ptr, None, None, None, 0,
            row, column, M, N, Q, 0, PTX, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        if EPILOGUE == "add":
            accumulator += tl.load(out_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out += the sum over the splits, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(out_ptr + at, mask=mask, other=0.0)
    parts_ptrs = parts_ptr + at
    for _ in tl.static_range(SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(parts_ptrs, mask=mask, other=0.0)
        parts_ptrs += size
    tl.store(out_ptr + at, total, mask=mask)
