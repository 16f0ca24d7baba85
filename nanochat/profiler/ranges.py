"""Which module, operation and optimizer runs at a moment: a callback on the way in and out of each.

    with watched(model, optimizers, enter, leave):
        train_step(...)

enter("module", "blocks.3.mlp") and leave() are called around every module's forward pass,
enter("operation", "relu2_mlp") around each call of an `Op`, enter("optimizer", "Muon") around each
step. The backward pass calls none of these; `backward_node` names its node.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nanochat.kernels.registry import REGISTRY

Enter = Callable[[str, str], None]
Leave = Callable[[], None]


@contextlib.contextmanager
def watched(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], enter: Enter, leave: Leave
) -> Iterator[None]:
    """Within the block, call enter(kind, name) and leave() around what runs, properly nested.

    The model is called "model", its modules by their names in it.
    """

    def ranged(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            enter("operation", name)
            try:
                return call(*args, **kwargs)
            finally:
                leave()

        return entered

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            begin = module.register_forward_pre_hook(
                lambda *_, name=name or "model": enter("module", name)
            )
            # also where the forward pass raises: out of memory is what one wants to know about
            end = module.register_forward_hook(lambda *_: leave(), always_call=True)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        for op in REGISTRY.values():
            stack.enter_context(op.wrapped(lambda call, name=op.name: ranged(call, name)))
        for optimizer in optimizers:
            name = type(optimizer).__name__
            begin = optimizer.register_step_pre_hook(lambda *_, name=name: enter("optimizer", name))
            end = optimizer.register_step_post_hook(lambda *_: leave())
            stack.callback(begin.remove)
            stack.callback(end.remove)
        yield


def backward_node() -> str:
    """Name of the autograd node that runs, such as "MmBackward0"; "" outside a backward pass."""
    if torch._C._current_graph_task_id() == -1:
        return ""
    node = torch._C._current_autograd_node()
    return "" if node is None else node.name()
