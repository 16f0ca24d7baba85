"""Triton kernels of block-scaled numbers."""
