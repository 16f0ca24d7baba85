"""Linear layers whose products are block-scaled, and models that are made of them.

    recipes          which of the three products of a layer are quantized, and how
    backends         who quantizes and multiplies: the kernels, or their emulation in PyTorch
    step_randomness  random numbers of a training step: functions of seed, step and rank
    quartet          the forward and backward pass as the Quartet paper has them
    linear           a linear layer, and the ReLU^2 network made of two
    coverage         what runs in which format: each product and its share of the FLOPs
    convert          a model's linear layers replaced, for training
    quantized        a model's linear layers replaced by stored 4-bit weights, for inference

May import: numbers, kernels.
"""
