"""Op: one reference and its faster implementations, chosen once at start and printed.

    my_op = Op("my_op", reference, cost, examples, workload)
    my_op.add("triton", triton_my_op, needs_triton, worth_compiling)

These two lines at the end of a file in this folder register an operation. `operations` finds it
there; the tests, the ahead-of-time gate, the bench, `--kernels` and the table in docs/kernels.md
all ask `operations`, so that nothing else has to be told.

An implementation says why it cannot run (`needs`); `select` turns a `--kernels` text into one
choice for every operation, all or none, before the model is built and compiled. There is no
fallback at call time: what was selected is what runs. On a GPU every implementation is tried on a
tiny example first; version numbers decide nothing.
"""

import contextlib
import difflib
import importlib
import pkgutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat import kernels
from nanochat.kernels.optional_triton import TritonError
from nanochat.kernels.workloads import Workload

Needs = Callable[[torch.device, torch.dtype], str]
REGISTRY: dict[str, "Op"] = {}  # of the files imported so far: ask `operations` for all
COLUMNS = 100  # of a line of the table on the console


def operations() -> dict[str, "Op"]:
    """Every operation by name: each file of this folder is imported once, and registers its own."""
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    return REGISTRY


def runs_everywhere(device: torch.device, dtype: torch.dtype) -> str:
    """The `needs` of an implementation in plain PyTorch."""
    return ""


@dataclass(frozen=True)
class Cost:
    """What a pass must do at least: floating-point operations, and bytes moved to and from memory.

    Every tensor that comes in or goes out is moved once. backward is the cost of the backward pass,
    None for an operation without one: rms_norm moves x and y forward, and x, dy and dx backward.
    """

    flops: float
    bytes: float
    backward: "Cost | None" = None

    def passes(self) -> dict[str, "Cost"]:
        """Cost of "forward", and where there is one of "backward" and of "both"."""
        forward = Cost(self.flops, self.bytes)
        if self.backward is None:
            return {"forward": forward}
        back = self.backward
        both = Cost(self.flops + back.flops, self.bytes + back.bytes)
        return {"forward": forward, "backward": back, "both": both}


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    needs  (device, dtype) -> "" if it can run there, otherwise the reason it cannot.
    auto   (device, dtype) -> "" if `--kernels=auto` may choose it, otherwise the reason against it.
    error  its error may be this many times that of the reference in the same dtype, both against
           float64; 2 leaves room for another order of sums.
    """

    name: str
    call: Callable[..., Any]
    needs: Needs
    auto: Needs = runs_everywhere
    error: float = 2.0


@dataclass(frozen=True)
class Choice:
    """What runs for one operation, and why the others do not."""

    op: str
    implementation: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)


class Op:
    """An operation: call it like a function; `select` decides what runs.

    reference  differentiable PyTorch; the oracle in float64, and the implementation of last resort.
    summary    what the fast implementations save, in a few words: a cell of docs/kernels.md.
    cost       same arguments as the call -> Cost.
    examples   device, dtype -> argument tuples: edge shapes (the first is tiny), then real ones.
    workload   Workload, device, dtype -> the arguments of the call inside a model.

    Raises  ValueError if an operation of that name exists: a copied file would replace it silently.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        cost: Callable[..., Cost],
        examples: Callable[[torch.device, torch.dtype], Iterable[tuple[Any, ...]]],
        workload: Callable[[Workload, torch.device, torch.dtype], tuple[Any, ...]],
        summary: str = "",
    ) -> None:
        if name in REGISTRY:
            raise ValueError(f"there is an operation {name!r} already; choose another name")
        self.name, self.summary = name, summary
        self.reference, self.cost = reference, cost
        self.examples, self.workload = examples, workload
        self.implementations = {
            "reference": Implementation("reference", reference, runs_everywhere)
        }
        self.selected = "reference"
        self._call = reference
        REGISTRY[name] = self

    def add(
        self,
        name: str,
        call: Callable[..., Any],
        needs: Needs = runs_everywhere,
        auto: Needs = runs_everywhere,
        error: float = 2.0,
    ) -> None:
        """Register an implementation; among the usable ones `auto` takes the one added last."""
        self.implementations[name] = Implementation(name, call, needs, auto, error)

    def triton_names(self) -> list[str]:
        """Names of the implementations in Triton, which all begin with that word."""
        return [name for name in self.implementations if name.startswith("triton")]

    def use(self, name: str) -> None:
        """Run implementation `name` from now on. `select` is the checked way to call this."""
        self.selected = name
        self._call = self.implementations[name].call

    @contextlib.contextmanager
    def wrapped(self, wrapper: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
        """Within the block, calls go to `wrapper` of the implementation: for profilers."""
        call = self._call
        self._call = wrapper(call)
        try:
            yield
        finally:
            self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def select(spec: str, device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Choose what runs for every operation; changes nothing if any part of `spec` is impossible.

    spec    "auto", "reference", an implementation's name, or a list such as
            "triton,attention=sdpa": the bare word holds for every operation that has an
            implementation of that name (the others take auto), `op=name` for one operation.
    Raises  ValueError for an unknown operation or implementation, or one that cannot run here.
    """
    # all choices first, so that an impossible one leaves everything as it was
    choices = choose(spec, device, dtype)
    for choice in choices:
        REGISTRY[choice.op].use(choice.implementation)
    return choices


def choose(
    spec: str, device: torch.device, dtype: torch.dtype, launching: bool = True
) -> list[Choice]:
    """What `select` would choose; nothing is changed.

    launching  False foresees the choice for a GPU that is not here, within `launch.recording` of
               its architecture: implementations are not tried on an example.
    """
    ops = operations()
    default, named = _parse(spec)
    return [
        _choose(op, named.get(op.name, default), op.name in named, device, dtype, launching)
        for op in ops.values()
    ]


def format_choices(choices: list[Choice], verbose: bool = False) -> str:
    """The table printed at start: a line of at most COLUMNS for each operation.

    A line holds operation, implementation, and why: where faster ones were refused, the reason
    against the first of them, shortened to fit. `verbose` gives every reason whole.
    """
    op_width = max(len(choice.op) for choice in choices)
    name_width = max(len(choice.implementation) for choice in choices)
    lines = ["kernels"]
    for choice in choices:
        start = f"  {choice.op:{op_width}}  {choice.implementation:{name_width}}  "
        refusals = [f"not {name}: {why}" for name, why in choice.refused.items()]
        if verbose:
            lines.append(start + "; ".join([choice.reason, *refusals]))
        else:
            reason = refusals[0] if refusals else choice.reason
            lines.append(start + textwrap.shorten(reason, COLUMNS - len(start), placeholder=" ..."))
    return "\n".join(lines)


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    default, named = "auto", {}
    known = {"auto"} | {name for op in REGISTRY.values() for name in op.implementations}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        op_name, separator, name = part.partition("=")
        if not separator:
            if part not in known:
                raise ValueError(_unknown("implementation", part, known))
            default = part
            continue
        if op_name not in REGISTRY:
            raise ValueError(_unknown("operation", op_name, set(REGISTRY)))
        allowed = {"auto"} | set(REGISTRY[op_name].implementations)
        if name not in allowed:
            raise ValueError(_unknown(f"implementation of {op_name}", name, allowed))
        named[op_name] = name
    return default, named


def probe(op: Op, implementation: Implementation, device: torch.device, dtype: torch.dtype) -> str:
    """Run the first example, forward and backward: "" if it ran, otherwise the error."""
    # the first example is tiny: this asks whether the kernel launches here, not whether it is right
    example = next(iter(op.examples(device, dtype)))
    arguments = [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in example
    ]
    try:
        outputs = implementation.call(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        totals = [y.float().sum() for y in outputs if y is not None and y.requires_grad]
        if totals:
            torch.stack(totals).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, ImportError, TritonError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _refusal(
    op: Op,
    implementation: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    launching: bool,
) -> str:
    reason = implementation.needs(device, dtype)
    on_gpu = device.type == "cuda" and launching
    if reason or implementation.name == "reference" or not on_gpu:
        return reason
    return probe(op, implementation, device, dtype)


def _choose(
    op: Op,
    wanted: str,
    named: bool,
    device: torch.device,
    dtype: torch.dtype,
    launching: bool,
) -> Choice:
    if wanted != "auto" and wanted in op.implementations:
        reason = _refusal(op, op.implementations[wanted], device, dtype, launching)
        if reason:
            raise ValueError(
                f"--kernels: {op.name}={wanted} cannot run on {device.type} in {dtype}: {reason}; "
                f"use {op.name}=auto or {op.name}=reference"
            )
        return Choice(op.name, wanted, "asked for" if named else f"asked for by {wanted!r}")
    # auto: the last one registered that can run and is worth running; the reference ends the list
    refused = {}
    for implementation in reversed(op.implementations.values()):
        reason = implementation.needs(device, dtype) or implementation.auto(device, dtype)
        reason = reason or _refusal(op, implementation, device, dtype, launching)
        if not reason:
            why = "auto" if wanted == "auto" else f"auto: no implementation named {wanted!r}"
            return Choice(op.name, implementation.name, why, refused)
        refused[implementation.name] = reason
    raise AssertionError(f"the reference of {op.name} runs everywhere")


def _unknown(what: str, name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"--kernels: unknown {what} {name!r}; {hint}known: {', '.join(sorted(known))}"
