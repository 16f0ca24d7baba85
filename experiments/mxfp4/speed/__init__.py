"""How fast it is: compiled code without a GPU, a forecast, and what measures it on one.

    aot       every kernel compiled for SM90, SM100 and SM120, and gated
    forecast  upper bounds by the speed of light
    bench     times of products, quantizers, layers and decoding on a GPU
    measured  measurements, whole training steps too, beside the forecast: the README's table

May import: numbers, kernels, layers.
"""
