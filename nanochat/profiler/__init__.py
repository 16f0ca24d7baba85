"""Where time and memory go.

    throughput   tokens/s, both MFUs, peak memory, time left, of every step
    ranges       which module, operation and optimizer runs
    memory       the bytes alive in a step by what they hold, and the moment of the peak
    activations  what each operation keeps for the backward pass, by arithmetic
    footprint    the memory of a step by arithmetic: steady, peak, and its moment
    forecast     the time of a step by arithmetic, as a range
    plan         the largest batch, hours and cost of a run
    allocator    the CUDA allocator's history, written at the end or when memory runs out

May import: common, hardware, kernels, scaling.
"""
