"""Where the memory of a training step goes: every storage that is alive, by what it holds.

    report = measure_memory(model, optimizers, lambda: train_step(model, optimizers, ...))

Bytes are those of storages, which is exact on the CPU and on the meta device, where nothing is
computed: a step of a d20 is counted in a second on a laptop. An allocator rounds up and keeps what
is freed, so a GPU's own figure (`torch.cuda.max_memory_allocated`) is larger. On the meta device
operations allocate what they would on a GPU of `architecture` (not measured there: see `AsOnGPU`).

    weights        parameters and buffers
    weight copies  parameters in the compute dtype, made again for every micro-batch
    gradients      of the parameters
    optimizer      its state
    activations    what the forward pass keeps for the backward pass; a view of a weight is none
    workspace      allocated inside an operation, and not what it returns
    temporaries    the rest: gradients of activations, results on their way, packed buckets

Source  saved tensors: torch.autograd.graph.saved_tensors_hooks.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._library.custom_ops
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.kernels.launch import Launch, recording
from nanochat.profiler.activations import Bytes
from nanochat.profiler.ranges import backward_node, watched

WEIGHTS, COPIES, GRADIENTS = "weights", "weight copies", "gradients"
OPTIMIZER, ACTIVATIONS = "optimizer", "activations"
WORKSPACE, TEMPORARIES = "workspace", "temporaries"
CATEGORIES = (WEIGHTS, COPIES, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE, TEMPORARIES)
# inside an operation of ours a cast arrives as "to", elsewhere autograd has taken it apart
CASTS = (torch.ops.aten._to_copy, torch.ops.aten.to)
Place = tuple[str, str]  # module, operation


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one step.

    steady       by category, between two steps
    peak         by category, at the moment when most was alive
    peak_moment  what ran then: "forward, lm_head, linear_cross_entropy", "backward, MmBackward0"
    activations  by (module, operation) that saved them, when most were alive
    timeline     all bytes alive after each operation that allocated something
    """

    steady: Bytes
    peak: Bytes
    peak_moment: str
    activations: dict[Place, int]
    timeline: list[int]

    def by_operation(self) -> Bytes:
        """Activations by operation, the largest first."""
        totals: Counter[str] = Counter()
        for (_, operation), count in self.activations.items():
            totals[operation] += count
        return dict(totals.most_common())


@dataclass
class _Storage:
    bytes: int
    category: str
    place: Place
    watcher: Any = None


class LiveMemory(TorchDispatchMode):
    """Counts the storages alive while it is entered; `measure_memory` is the way to use it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, _Storage] = {}
        self.totals: Counter[str] = Counter()
        self.saved: Counter[Place] = Counter()
        self.peak: Bytes = {}
        self.peak_moment = ""
        self.most_saved: dict[Place, int] = {}
        self.timeline: list[int] = []
        self.running: list[tuple[str, str]] = []  # what `watched` has entered
        self.inside_operations = 0

    def enter(self, kind: str, name: str) -> None:
        """A module, an operation or an optimizer begins."""
        self.running.append((kind, name))

    def leave(self) -> None:
        """What began last ends."""
        self.running.pop()

    def place(self) -> Place:
        """The innermost module and operation; a module of torch stands for its operation."""
        modules = [name for kind, name in self.running if kind == "module"]
        operations = [name for kind, name in self.running if kind == "operation"]
        module = modules[-1] if modules else "outside the model"
        return module, operations[-1] if operations else module.rpartition(".")[2]

    def moment(self) -> str:
        """What runs, in words."""
        if node := backward_node():
            return f"backward, {node}"
        if not self.running:
            return "between the backward pass and the optimizer"
        if self.running[0][0] == "optimizer":
            return ", ".join(["optimizer", *(name for _, name in self.running)])
        return ", ".join(["forward", *dict.fromkeys(self.place())])

    def add(
        self, tensors: Iterable[Tensor], category: str, given: Container[int] = ()
    ) -> list[_Storage]:
        """Count the storages of tensors that are neither counted yet nor `given` by their keys."""
        added = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.alive and key not in given:
                record = _Storage(storage.nbytes(), category, self.place())
                record.watcher = weakref.finalize(storage, self.drop, key)
                record.watcher.atexit = False
                self.alive[key] = record
                self.totals[category] += record.bytes
                added.append(record)
        return added

    def drop(self, key: int) -> None:
        """A storage is freed."""
        record = self.alive.pop(key)
        if record.category == ACTIVATIONS:
            self._keep_most_saved()
            self.saved[record.place] -= record.bytes
        self.totals[record.category] -= record.bytes

    def become(self, tensor: Tensor, category: str) -> None:
        """A storage turns out to hold something else than a temporary."""
        record = self.alive.get(tensor.untyped_storage()._cdata)
        if record is None or record.category not in (TEMPORARIES, WORKSPACE):
            return  # a weight, a copy of one, or saved before
        self.totals[record.category] -= record.bytes
        record.category, record.place = category, self.place()
        self.totals[category] += record.bytes
        if category == ACTIVATIONS:
            self.saved[record.place] += record.bytes

    def save(self, tensor: Tensor) -> Tensor:
        """Autograd keeps a tensor for the backward pass."""
        self.become(tensor, ACTIVATIONS)
        return tensor

    def _keep_most_saved(self) -> None:
        # asked before something goes: only then can a maximum have been reached
        if self.saved.total() > sum(self.most_saved.values()):
            self.most_saved = {place: count for place, count in self.saved.items() if count}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = operation_body(func)
        if body is None:
            result = func(*args, **kwargs)
        else:
            # run here what the operation does, so that its own allocations are seen as well
            self.inside_operations += 1
            with self, torch.no_grad():
                result = body(*args, **kwargs)
            self.inside_operations -= 1
        made = tensors_of(result)
        # what the caller of the step holds, such as the batches, is not the step's
        given = {x.untyped_storage()._cdata for x in tensors_of((args, kwargs))}
        category = WORKSPACE if self.inside_operations else TEMPORARIES
        if func.overloadpacket in CASTS:
            source, copy = args[0], made[0]
            if self._holds(source, WEIGHTS):
                category = COPIES
            elif self.inside_operations and copy.is_meta and copy.itemsize > source.itemsize:
                # a detour of the CPU: cuBLAS sums 16-bit products in float32 without it
                given.add(copy.untyped_storage()._cdata)
        if body is not None and not self.inside_operations:
            for x in made:
                self.become(x, TEMPORARIES)  # results are no workspace
        if self.add(made, category, given):
            total = self.totals.total()
            self.timeline.append(total)
            if total > sum(self.peak.values()):
                self.peak = {name: self.totals[name] for name in CATEGORIES}
                self.peak_moment = self.moment()
        return result

    def _holds(self, tensor: Tensor, category: str) -> bool:
        record = self.alive.get(tensor.untyped_storage()._cdata)
        return record is not None and record.category == category


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor inside nested arguments or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def operation_body(func: Any) -> Callable[..., Any] | None:
    """The Python function of an operation of ours, None for any other."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.name.startswith("nanochat::"):
        return None
    return torch._library.custom_ops.OPDEFS[schema.name]._init_fn


class _Forgetful(list[Launch]):
    """Takes launches and keeps none: their arguments would count as alive."""

    def append(self, item: Launch) -> None:
        pass


class AsOnGPU(TorchFunctionMode):
    """On the meta device, operations of PyTorch that keep more there than on a GPU keep as little:
    causal attention no scores, a norm no float32 copy of its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta and kwargs.get("is_causal"):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args[:3], 0.0, True)[0]
        if func in (F.rms_norm, torch.rms_norm) and args[0].is_meta:
            return _NormOnGPU.apply(args[0])
        return func(*args, **kwargs)


class _NormOnGPU(torch.autograd.Function):
    """What aten::_fused_rms_norm without a weight allocates and saves on a GPU."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.empty_like(ctx.saved_tensors[0])


def measure_memory(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: Callable[[], object],
    architecture: str = "sm_90",
) -> MemoryReport:
    """Count the storages alive while `step` runs.

    step          a whole optimizer step that ends with zero_grad(), as train_step does; tensors
                  that exist before it and are neither the model's nor the optimizers' do not count.
    architecture  on the meta device: of the GPU whose kernel configurations count.
    """
    memory = LiveMemory()
    parameters = list(model.parameters())
    memory.add([*parameters, *model.buffers()], WEIGHTS)
    memory.add((p.grad for p in parameters if p.grad is not None), GRADIENTS)
    for optimizer in optimizers:
        memory.add(tensors_of(optimizer.state_dict()["state"]), OPTIMIZER)

    def becomes_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        memory.become(parameter.grad, GRADIENTS)

    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(becomes_gradient)
            stack.callback(handle.remove)
        if parameters[0].is_meta:
            stack.enter_context(recording(architecture)).launches = _Forgetful()
            stack.enter_context(AsOnGPU())
        stack.enter_context(watched(model, optimizers, memory.enter, memory.leave))
        hooks = torch.autograd.graph.saved_tensors_hooks(memory.save, lambda x: x)
        stack.enter_context(hooks)
        stack.enter_context(memory)
        step()
    memory._keep_most_saved()
    steady = {name: memory.totals[name] for name in CATEGORIES}
    for record in memory.alive.values():
        record.watcher.detach()
    return MemoryReport(steady, memory.peak, memory.peak_moment, memory.most_saved, memory.timeline)
