"""Whether a kernel multiplies on block-scaled tensor cores: read from its PTX.

Where a GPU lacks them, Triton multiplies in bfloat16 and says nothing. No version number and no
name of a GPU decides here: only the instructions of the kernel that would run.
"""

import functools
import re
from typing import Any

import torch

from nanochat.kernels.aot import compile_for
from nanochat.kernels.launch import Launch
from nanochat.kernels.optional_triton import TritonError, triton

MATRIX_PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+")
BLOCK_SCALE = ".block_scale"
SIZE = 128  # stands for every size: which instructions are chosen does not depend on it


class NotNativeError(RuntimeError):
    """A product would not run on block-scaled tensor cores."""


def matrix_products(ptx: str) -> list[str]:
    """The distinct matrix instructions of a PTX text, in order."""
    return list(dict.fromkeys(MATRIX_PRODUCT.findall(ptx)))


def block_scaled(instructions: list[str]) -> str:
    """The first block-scaled one among matrix instructions, or ""."""
    return next((name for name in instructions if BLOCK_SCALE in name), "")


def require_block_scale(launch: Launch, fmt: str, target: str) -> str:
    """The block-scaled instruction that a launch becomes on `target` ("sm_120").

    Compiled once for each kernel, its constants and target.
    Raises  NotNativeError naming target, Triton version and what was found instead.
    """
    # Only types enter the key: a training run compiles each kernel once, whatever its sizes.
    kinds = tuple(
        x.dtype if isinstance(x, torch.Tensor) else SIZE if isinstance(x, int) else x
        for x in launch.arguments
    )
    found = _compiled_products(launch.kernel, kinds, tuple(launch.options.items()), target)
    instruction = block_scaled(list(found))
    if not instruction:
        raise NotNativeError(
            f"{fmt} products on {target} with Triton {triton.__version__} do not run on "
            f"block-scaled tensor cores; found: {', '.join(found) or 'no matrix instruction'}. "
            "Choose a GPU that has them (sm_100, sm_120), or emulation, by name"
        )
    return instruction


@functools.cache
def _compiled_products(
    kernel: Any, kinds: tuple[Any, ...], constants: tuple[tuple[str, Any], ...], target: str
) -> tuple[str, ...]:
    """Matrix instructions of a kernel, or one phrase that says why there are none."""
    if isinstance(kernel, triton.runtime.interpreter.InterpretedFunction):
        return ("the interpreter (TRITON_INTERPRET is set)",)
    arguments = (torch.empty(0, dtype=k) if isinstance(k, torch.dtype) else k for k in kinds)
    launch = Launch(kernel, tuple(arguments), dict(constants))
    try:
        compiled = compile_for(launch, int(target.removeprefix("sm_")))
    except (RuntimeError, TritonError) as error:  # it gave up, as for nvfp4 on sm_90
        return (f"no code: {error}",)
    return tuple(matrix_products(compiled.asm["ptx"]))
