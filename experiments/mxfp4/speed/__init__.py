"""How fast it is: compiled code without a GPU, a forecast, and what measures it on one.

    aot       every kernel compiled for SM90, SM100 and SM120, and gated
    forecast  upper bounds by the speed of light
    bench     times of products, quantizers, layers and decoding on a GPU
    steps     times of whole training steps, from the records of runs
    measured  measurements beside the forecast: the table of the README

May import: numbers, kernels, layers.
"""
