"""nanochat: train and study small GPTs end to end on custom Triton kernels."""
