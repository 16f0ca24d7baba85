"""Where time and memory go.

    throughput   tokens/s, both MFUs, peak memory, time left, of every step
    timeline     events -> whose each nanosecond of a step is: stage, operation, or nobody's
    capture      some steps under torch.profiler, with ranges that carry our names
    breakdown    a profile as a record, and as tables: time, rates, speed of light, MFU, HFU
    toggles      each kernel alone, without each, all on, all off, compiled: the matrix
    proton       FLOPs and bytes of each launch, for Triton's Proton
    ranges       which module, operation and optimizer runs
    memory       the bytes alive in a step by what they hold, and the moment of the peak
    allocator    the CUDA allocator's history, written at the end or when memory runs out

May import: common, hardware, kernels.
"""
