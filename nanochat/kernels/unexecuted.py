"""What a call launches at any size, without running it: memory that nobody writes.

    recorded, rest = launches(op, "triton", "sm_90", WORKLOADS["d20"])

The step of a large model takes hours on a CPU, and a recorder of launches needs only shapes: within
`Unexecuted` every operation of PyTorch returns memory of the right shape at once, whose pages are
never touched, and what it would have cost is added up. Our operations run, and launch into the
recorder. The loss of 65,536 tokens over 65,536 words records nine launches of up to 7552 rows in
a second, beside 33 TFLOP of products.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nanochat.kernels.launch import Launch, recording
from nanochat.kernels.registry import Op
from nanochat.kernels.workloads import Workload

# how many tensors of a product are given, of which the last two are multiplied
PRODUCTS = {"mm": 2, "bmm": 2, "addmm": 3, "baddbmm": 3}
# Memory that nobody writes; and casts, since on the CPU, where launches are recorded, 16-bit
# products are taken of float32 copies that a GPU does not make.
UNCOUNTED = ("empty_like", "new_empty", "new_empty_strided", "_to_copy")


@dataclass
class Rest:
    """What PyTorch computes between our kernels."""

    product_flops: float = 0
    moved: float = 0  # bytes of operations that are no products, `calls` of them
    calls: int = 0


class Unexecuted(TorchDispatchMode):
    """Operations return memory that nobody writes, so that a step of any size takes no time.

    Our own run, so that their launches are recorded; views are real views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rest = Rest()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "nanochat":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        if func._can_decompose():  # such as `to` and `reshape`, which may be views
            with self:
                return func.decompose(*args, **kwargs)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        kwargs = {k: torch.device("meta") if k == "device" and v else v for k, v in kwargs.items()}
        if not given:
            kwargs["device"] = torch.device("meta")
        out = func(*_on_meta(args), **_on_meta(kwargs))
        self._note(func.overloadpacket.__name__.rstrip("_"), given, out)
        # in place, or into a tensor that was given: that one is returned
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info and argument.alias_info.is_write
        ] + ([kwargs["out"]] if "out" in kwargs else [])
        return written[0] if written else _like(out, "cpu")

    def _note(self, name: str, given: list[torch.Tensor], out: Any) -> None:
        if name in PRODUCTS:
            *_, left, right = given[: PRODUCTS[name]]
            self.rest.product_flops += 2 * left.numel() * right.shape[-1]
        elif given and name not in UNCOUNTED:
            outputs = out if isinstance(out, tuple | list) else (out,)
            self.rest.moved += sum(bytes_of(x) for x in (*given, *outputs))
            self.rest.calls += 1


def _like(tree: Any, device: str) -> Any:
    """Memory on `device` in place of every tensor, of the same shape and strides."""

    def unwritten(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    return tree_map_only(torch.Tensor, unwritten, tree)


def _on_meta(tree: Any) -> Any:
    return _like(tree, "meta")


def bytes_of(x: Any) -> int:
    """Of the elements of a tensor or of a TMA descriptor's; 0 of anything else."""
    x = getattr(x, "base", x)
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


def launches(op: Op, name: str, target: str, workload: Workload) -> tuple[list[Launch], Rest]:
    """What one call launches, forward and backward, and what PyTorch does besides."""
    with recording(target) as recorder, Unexecuted() as step:
        arguments = op.workload(workload, torch.device("cpu"), torch.bfloat16)
        differentiated = op.cost(*arguments).backward is not None
        for x in arguments if differentiated else ():
            if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
                x.requires_grad_()
        step.rest = Rest()  # what made the arguments does not count
        outputs = op.implementations[name].call(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [y for y in outputs if y is not None and y.requires_grad]
        if differentiated:
            leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
    return recorder.launches, step.rest
