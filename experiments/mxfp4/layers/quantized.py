"""Models whose linear layers are stored in mxfp4, 4.25 bits a weight, for inference.

Activations stay in the compute dtype. On a GPU, products of up to 16 rows (decoding) read the codes
directly (kernels.gemv); others, and all of them on a CPU, multiply with the dequantized weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mxfp4.kernels.gemv import ROWS_MAX, gemv
from experiments.mxfp4.layers.convert import (
    kept_layers,
    linear_layers,
    replace_mlps,
    replace_module,
)
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor
from experiments.mxfp4.numbers.layout import swizzled_shape
from nanochat.common import print0
from nanochat.gpt import GPT

FORMAT = "mxfp4"
DEFAULT = Quantizer(FORMAT, "even")


class QuantizedLinear(nn.Module):
    """y = x W^T with W (N, K) stored as codes and scales.

    Raises  ValueError if K does not divide into blocks.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__()
        fmt = FORMATS[FORMAT]
        if in_features % fmt.block:
            raise ValueError(f"{in_features} input features are no multiple of {fmt.block}")
        codes = (out_features, in_features // fmt.elements_per_byte)
        scales = swizzled_shape(out_features, in_features // fmt.block)
        for name, shape in (("codes", codes), ("scales", scales)):
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device))

    @property
    def weight(self) -> ScaledTensor:
        """The matrix as it is stored."""
        return ScaledTensor(self.codes, self.scales, FORMAT, self.codes.shape[1] * 2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "weights in mxfp4 are for inference: train the checkpoint they were made of"
            )
        x_MK = x.reshape(-1, x.shape[-1])
        if x.is_cuda and x_MK.shape[0] <= ROWS_MAX:
            y = gemv(x_MK, self.weight)
        else:
            y = F.linear(x_MK, reference.dequantize(self.weight, x.dtype))
        return y.unflatten(0, x.shape[:-1])


def quantized_state(
    model: GPT, keep: list[str], quantizer: Quantizer = DEFAULT
) -> dict[str, Tensor]:
    """The model's state with codes and scales in place of weights; the rest in bfloat16.

    Raises  ValueError for a pattern in `keep` that names no layer.
    """
    layers = linear_layers(model)
    kept = kept_layers(layers, keep)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in layers and layer not in kept:
            t = reference.quantize(tensor, quantizer)
            state[f"{layer}.codes"], state[f"{layer}.scales"] = t.codes, t.scales
        else:
            state[name] = tensor.bfloat16()
    return state


def accept_quantized(model: GPT, description: Mapping[str, Any]) -> None:
    """Replace the linear layers so that a state of `quantized_state` loads into the model.

    description  "keep" and "bits" of the checkpoint
    """
    layers = linear_layers(model)
    kept = kept_layers(layers, description["keep"])
    for name, layer in layers.items():
        if name in kept:
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        outputs, inputs = weight.shape
        replace_module(model, name, QuantizedLinear(outputs, inputs, model.device))
    replace_mlps(model)
    for parameter in model.parameters():  # in the dtype of use: the engine then makes no copy
        parameter.data = parameter.data.to(model.dtype)
    direct = f"up to {ROWS_MAX} rows from the codes, more " if model.device.type == "cuda" else ""
    print0(
        f"weights of {len(layers) - len(kept)} layers in mxfp4, {description['bits']} bits each; "
        f"products: {direct}from dequantized weights in {model.dtype}"
    )
