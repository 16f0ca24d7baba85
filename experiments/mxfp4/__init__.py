"""Training and inference in block-scaled 4-bit and 8-bit numbers.

At the door are the two ways to use it:

    precision            what --precision=mxfp4 loads: a model converted for training
    quantize_checkpoint  a checkpoint whose weights take 4.25 bits, for inference

Floors, from the ground; a module imports its own floor or below, and nanochat from any floor:

    numbers
    kernels
    layers
    precision quantize_checkpoint studies speed
"""
