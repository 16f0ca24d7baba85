"""Where time and memory go.

    throughput   tokens/s, both MFUs, peak memory, time left, of every step

May import: common.
"""
