"""Triton kernels of block-scaled numbers: quantizers and matrix products.

    blocks        device functions that quantize a tile in registers and store it
    quantize      a matrix quantized along its rows, its columns, or both in one pass
    ptx           the matrix instructions of a compiled kernel; refuses what is not block-scaled
    gemm_kernels  products of block-scaled matrices: the Triton kernels
    gemm          products of block-scaled matrices: the operations
    gemv          a few rows times a weight in MXFP4: the product of decoding
    native        whether this GPU multiplies a format natively

May import: numbers.
"""
