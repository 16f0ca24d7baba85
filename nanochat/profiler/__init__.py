"""Where time and memory go.

    throughput   tokens/s, both MFUs, peak memory, time left, of every step
    timeline     events -> whose each nanosecond of a step is: stage, operation, or nobody's
    capture      some steps under torch.profiler, with ranges that carry our names
    breakdown    a profile as a record, and as tables: time, rates, speed of light, MFU, HFU
    toggles      each kernel alone, without each, all on, all off, compiled: the matrix
    proton       FLOPs and bytes of each launch, for Triton's Proton
    ranges       which module, operation and optimizer runs
    memory       the bytes alive in a step by what they hold, and the moment of the peak
    activations  what each operation keeps for the backward pass, by arithmetic
    footprint    the memory of a step by arithmetic: steady, peak, and its moment
    forecast     the time of a step by arithmetic, as a range
    plan         the largest batch, hours and cost of a run
    allocator    the CUDA allocator's history, written at the end or when memory runs out

May import: common, hardware, kernels, scaling.
"""
