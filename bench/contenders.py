"""Who is measured for an operation, on what, and whether the results are right.

Contenders are eager and compiled PyTorch, every implementation of ours, and the peers. The check
is the rule of tests/kernels/test_kernels.py: the error against the reference in float64 is at most
twice that of eager PyTorch in the same dtype, for every output and every gradient. At full size,
where float64 does not fit, a contender may differ from eager by four of eager's own errors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import Stage
from bench.peers import PEERS
from nanochat.kernels.optional_triton import TritonError, is_interpreting
from nanochat.kernels.registry import Op, select
from nanochat.kernels.workloads import Workload

EAGER, COMPILE, OURS, PEER = "eager", "compile", "ours", "peer"
TIMED, REFUSED, MISSING = "timed", "refused", "missing"
# What code of ours, of Triton, of the compiler or of a peer raises when it cannot run something.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TritonError,
    TypeError,
    ValueError,
)


@dataclass
class Contender:
    """Something that computes an operation, and what came of it.

    status   TIMED; MISSING if it cannot take part here, REFUSED once it fails or is wrong: `reason`
    samples  seconds of each stage and round
    """

    name: str
    role: str
    call: Any = None  # where it is missing
    status: str = TIMED
    reason: str = ""
    peak_bytes: int | None = None
    samples: list[list[float]] = field(default_factory=list)

    def out(self, status: str, reason: str) -> "Contender":
        """It will not be timed."""
        self.status, self.reason = status, reason
        return self


def names(op: Op) -> list[str]:
    """Contenders of an operation, whether they can run here or not."""
    ours = [name for name in op.implementations if name != "reference"]
    return [EAGER, COMPILE, *ours, *PEERS.get(op.name, {})]


def contenders(op: Op, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """All of `names`, loaded where possible."""
    compiled = torch.compile(op.reference, fullgraph=True, dynamic=False)
    ours = [name for name in op.implementations if name != "reference"]
    return [
        Contender(EAGER, EAGER, op.reference),
        Contender(COMPILE, COMPILE, compiled),
        *(_ours(op, name, device, dtype) for name in ours),
        *(_peer(op, name, device) for name in PEERS.get(op.name, {})),
    ]


def _ours(op: Op, name: str, device: torch.device, dtype: torch.dtype) -> Contender:
    implementation = op.implementations[name]
    missing = implementation.needs(device, dtype)
    if not missing and name.startswith("triton") and is_interpreting():
        missing = "interpreted: there is no time to measure"
    contender = Contender(name, OURS, implementation.call)
    return contender.out(MISSING, missing) if missing else contender


def _peer(op: Op, name: str, device: torch.device) -> Contender:
    contender, loader = Contender(name, PEER), PEERS[op.name][name]
    if isinstance(loader, str):
        return contender.out(MISSING, loader)
    try:
        contender.call = loader()
    except ImportError as error:
        return contender.out(MISSING, str(error))
    except FAILURES as error:
        return contender.out(MISSING, f"fails to import: {first_line(error)}")
    if device.type != "cuda" and not name.startswith("torch"):
        return contender.out(MISSING, f"runs on CUDA, not on {device.type}")
    return contender


def auto_choices(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """operation -> implementation that `--kernels=auto` picks here."""
    return {choice.op: choice.implementation for choice in select("auto", device, dtype)}


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


CHECK_TOKENS = 2048  # one sequence: float64 logits of a whole vocabulary fit beside their gradients
ABSOLUTE = 1e-6
# A mean over thousands of tokens hits the exact value by luck: eager's error says little there.
SCALAR_EPS = 0.01
FULL_SIZE_FACTOR = 4  # own error twice eager's, eager's once, and room for another data set


@dataclass(frozen=True)
class Case:
    """Arguments of a call; `leaves` are those with a gradient, one weight for each output.

    in_place  the operation returns nothing and changes its arguments.
    """

    arguments: tuple[Any, ...]
    leaves: tuple[Tensor, ...] = ()
    output_gradients: tuple[Tensor, ...] = ()
    in_place: bool = False

    def stages(self, call: Callable[..., Any]) -> list[Stage]:
        """Forward, and backward where the operation has one."""

        def forward(_: Any) -> tuple[Tensor, ...]:
            outputs = call(*self.arguments)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, self.leaves, self.output_gradients)

        return [forward, backward] if self.leaves else [forward]

    def results(self, call: Callable[..., Any]) -> list[Tensor]:
        """Every output, then every gradient; of an operation in place, its arguments after it."""
        if self.in_place:
            copies = [x.clone() if isinstance(x, Tensor) else x for x in self.arguments]
            call(*copies)
            return [x for x in copies if isinstance(x, Tensor)]
        found: list[Tensor] = []
        value = None
        for stage in self.stages(call):
            value = stage(value)
            found += value
        return [x.detach() for x in found]

    def exact(self) -> "Case":
        """The same numbers in float64, computed with in float64."""

        def upcast(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return torch.float64
            if isinstance(x, Tensor) and x.is_floating_point():
                return x.detach().double().requires_grad_(x.requires_grad)
            return x

        arguments = tuple(upcast(x) for x in self.arguments)
        leaves = tuple(x for x in arguments if isinstance(x, Tensor) and x.requires_grad)
        gradients = tuple(g.double() for g in self.output_gradients)
        return Case(arguments, leaves, gradients, self.in_place)


def make_case(op: Op, workload: Workload, device: torch.device, dtype: torch.dtype) -> Case:
    """Random arguments and random gradients of the outputs; the reference tells their shapes."""
    shapes = op.workload(workload, torch.device("meta"), dtype)
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in shapes]
    traced = tuple(
        x.requires_grad_() if is_float else x for x, is_float in zip(shapes, floating, strict=True)
    )
    outputs = op.reference(*traced)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    arguments = op.workload(workload, device, dtype)
    if outputs == (None,):
        return Case(arguments, in_place=True)
    if not any(y.requires_grad for y in outputs):
        return Case(arguments)
    inputs = [x for x, is_float in zip(traced, floating, strict=True) if is_float]
    gradients = torch.autograd.grad(
        outputs, inputs, [torch.empty_like(y) for y in outputs], allow_unused=True
    )
    differentiated = {id(x) for x, g in zip(inputs, gradients, strict=True) if g is not None}
    pairs = zip(arguments, traced, strict=True)
    leaves = tuple(x.requires_grad_() for x, meta in pairs if id(meta) in differentiated)
    return Case(arguments, leaves, tuple(_output_gradient(y, device) for y in outputs))


def check_case(op: Op, workload: Workload, device: torch.device, dtype: torch.dtype) -> Case:
    """The workload with the tokens and layers that the check against float64 takes."""
    tokens, layers = min(workload.tokens, CHECK_TOKENS), min(workload.layers, 2)
    return make_case(op, replace(workload, tokens=tokens, layers=layers), device, dtype)


def _output_gradient(y: Tensor, device: torch.device) -> Tensor:
    if y.dim() == 0:
        return torch.ones((), dtype=y.dtype, device=device)  # what a loss gets
    return torch.randn(y.shape, dtype=y.dtype, device=device)


def rms(x: Tensor) -> float:
    """Root of the mean square, summed in float64."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_errors(eager: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Eager's own error, as a share of each exact result."""
    return [rms(e - w) / (rms(w) or 1.0) for e, w in zip(eager, exact, strict=True)]


def refusal(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """ "" if `got` passes the rule against float64, otherwise what is wrong."""
    errors = [2 * rms(e - w) for e, w in zip(eager, exact, strict=True)]
    return _compare(got, exact, errors, _scalar_slack(eager), "float64")


def refusal_at_full_size(
    got: Sequence[Tensor], eager: Sequence[Tensor], errors: Sequence[float]
) -> str:
    """ "" if `got` is as near to eager as `errors`, eager's relative ones, let it be."""
    allowed = [FULL_SIZE_FACTOR * x * rms(e) for e, x in zip(eager, errors, strict=True)]
    return _compare(got, eager, allowed, _scalar_slack(eager), "eager at full size")


def _scalar_slack(results: Sequence[Tensor]) -> float:
    return SCALAR_EPS * max(torch.finfo(x.dtype).eps for x in results)


def _compare(
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    errors: Sequence[float],
    slack: float,
    against: str,
) -> str:
    """What differs by more than `errors`, beyond a small absolute term."""
    if len(got) != len(want):
        return f"{len(got)} results instead of {len(want)}"
    for index, (g, w, error) in enumerate(zip(got, want, errors, strict=True)):
        if g.shape != w.shape:
            return f"result {index} has shape {tuple(g.shape)}, not {tuple(w.shape)}"
        if not torch.isfinite(g).all():
            return f"result {index} is not finite"
        scale = rms(w)
        limit = error + ABSOLUTE * max(1.0, scale) + (slack * scale if w.dim() == 0 else 0.0)
        found = rms(g - w)
        if found > limit:
            return f"result {index} errs by {found:.2e} against {against}, allowed {limit:.2e}"
    return ""
