"""Weights for inference: in the compute dtype, once, instead of a cast in every step."""

import torch

from nanochat.gpt import GPT


def cast_weights(model: GPT) -> GPT:
    """The model with weights in its compute dtype: itself if they already are, else a copy."""
    if all(p.dtype == model.dtype for p in model.parameters()):
        return model
    with torch.device("meta"):
        twin = GPT(model.config, model.dtype)
    weights = {name: w.to(model.dtype) for name, w in model.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    twin.cos, twin.sin = model.cos, model.sin
    return twin.requires_grad_(False)
