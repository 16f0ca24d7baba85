"""Training in block-scaled 4-bit numbers: formats, kernels, recipes."""
