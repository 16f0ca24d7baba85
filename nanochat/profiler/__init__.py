"""Where time and memory go.

    throughput   tokens/s, both MFUs, peak memory, time left, of every step
    ranges       which module, operation and optimizer runs
    memory       the bytes alive in a step by what they hold, and the moment of the peak
    allocator    the CUDA allocator's history, written at the end or when memory runs out

May import: common, kernels.
"""
