"""Does this GPU multiply a format natively? Asked once, before a model is converted.

The products themselves refuse to run where the answer is no (`kernels.gemm`): nothing here, and no
flag, lets one fall back silently.
"""

import torch

from experiments.mxfp4.kernels.gemm import matmul
from experiments.mxfp4.kernels.ptx import NotNativeError, require_block_scale
from experiments.mxfp4.numbers.formats import FORMATS, ScaledTensor
from experiments.mxfp4.numbers.layout import swizzled_shape
from nanochat.kernels.launch import Launch, architecture_of, recording

WIDTH = 768  # of the d12 model


def example_operand(fmt: str, rows: int, columns: int) -> ScaledTensor:
    """A matrix of the sizes of a real one, with nothing in it."""
    number = FORMATS[fmt]
    codes = torch.empty((rows, columns // number.elements_per_byte), dtype=torch.uint8)
    scales = torch.empty(swizzled_shape(rows, columns // number.block), dtype=torch.uint8)
    return ScaledTensor(codes, scales, fmt, columns, torch.ones(()) if fmt == "nvfp4" else None)


def example_launch(fmt: str, target: str) -> Launch:
    """The launch of a product in format `fmt` on `target`."""
    operand = example_operand(fmt, 128, WIDTH)
    with recording(target) as recorder:
        matmul(operand, operand)
    return recorder.launches[0]


def require_native(fmt: str, target: str | None = None) -> str:
    """The instruction that multiplies `fmt`, such as "mma.sync...kind::mxf4nvf4.block_scale...".

    target  "sm_120", "sm_100", "sm_90": compiled for it, no GPU needed; None is the current GPU.
    Raises  NotNativeError where there is none: it names the GPU, Triton's version and the
            instruction found instead. ValueError for an unknown format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"format is {fmt!r}; choose one of {', '.join(FORMATS)}")
    if target is None:
        if not torch.cuda.is_available():
            raise NotNativeError(f"{fmt} products need a GPU, and there is none; name a target")
        target = architecture_of(torch.device("cuda"))
    return require_block_scale(example_launch(fmt, target), fmt, target)


def is_native(fmt: str, target: str | None = None) -> bool:
    """Whether `require_native` finds an instruction."""
    try:
        require_native(fmt, target)
    except NotNativeError:
        return False
    return True
