"""Block-scaled numbers in plain PyTorch: what is stored, and what the kernels must compute.

    formats     MXFP4, MXFP8, NVFP4: elements, blocks, scales; how a matrix is quantized
    layout      how codes and scales lie in memory: nibbles, swizzled tiles of scales
    randomness  Philox bits of stochastic rounding, and the random Hadamard transform
    reference   quantize and dequantize: the oracle of the kernels, and their emulation

May import: nothing.
"""
