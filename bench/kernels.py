"""Measure every contender of an operation at one size: check first, then time together.

Passes  forward (as in training, so with what it saves), backward, both (their sum). Operations
        without a gradient have the forward pass only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.configurations import uses
from bench.contenders import (
    COMPILE,
    EAGER,
    FAILURES,
    MISSING,
    OURS,
    PEER,
    REFUSED,
    TIMED,
    Case,
    Contender,
    check_case,
    contenders,
    first_line,
    make_case,
    refusal,
    refusal_at_full_size,
    relative_errors,
)
from bench.measure import free, interleave, peak_memory, summarise
from bench.peers import MisfitError
from bench.rows import Row, speedup
from bench.session import Ceilings, Session
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.roofline import bound, speed_of_light
from nanochat.kernels.workloads import Workload


def kernel_rows(op: Op, workload: Workload, session: Session) -> list[Row]:
    """Rows of every contender and pass of one operation at one size."""
    device, dtype = session.runtime.device, session.runtime.dtype
    torch._dynamo.reset()  # beyond a few shapes of one function it silently falls back to eager
    torch.manual_seed(session.runtime.seed)
    everyone = contenders(op, device, dtype)
    case = make_case(op, workload, device, dtype)
    check(op, workload, case, everyone, session)
    stages = {each.name: case.stages(each.call) for each in everyone if each.status == TIMED}
    samples = interleave(stages, session.timer, session.seconds) if stages else {}
    for each in everyone:
        each.samples = samples.get(each.name, [])
    cost = op.cost(*case.arguments)
    shared = {
        "kind": "kernel",
        "op": op.name,
        "workload": workload.name,
        "tokens": workload.tokens,
        "shapes": _shapes(case),
    }
    names = list(cost.passes())
    found = []
    for name in names:
        whole = {"whole": name == names[-1]}  # the pass that counts
        found += _pass_rows(name, everyone, cost, shared | whole, session)
    for row in found:
        row["config"] = _configuration(op, workload, row, session)
    return found


def check(
    op: Op, workload: Workload, case: Case, everyone: Sequence[Contender], session: Session
) -> None:
    """Put out every contender that fails, is wrong, or does not fit the memory.

    Eager goes first: it is the measure, at full size too where it fits.
    """
    device, dtype = session.runtime.device, session.runtime.dtype
    small = check_case(op, workload, device, dtype)
    exact = small.exact().results(op.reference)
    eager_small = small.results(op.reference)
    errors = relative_errors(eager_small, exact)
    eager: list[Tensor] | None = None
    for contender in everyone:
        if contender.status != TIMED:
            continue
        call, role = contender.call, contender.role
        try:
            # compiled once, for the size it is timed at, unless eager cannot vouch for it there
            if role != EAGER and (role != COMPILE or eager is None):
                reason = refusal(small.results(call), eager_small, exact)
                if reason:
                    contender.out(REFUSED, reason)
                    continue
            results = case.results(call)
            if role == EAGER:
                eager = results
            reason = refusal_at_full_size(results, eager, errors) if eager else ""
            if reason:
                contender.out(REFUSED, reason)
                continue
            del results
            contender.peak_bytes = peak_memory(case.stages(call), device)
        except MisfitError as error:
            contender.out(MISSING, str(error))
        except FAILURES as error:
            contender.out(REFUSED, first_line(error))
        if contender.status == REFUSED:
            free(device)


def _pass_rows(
    name: str, everyone: Sequence[Contender], cost: Cost, shared: Row, session: Session
) -> list[Row]:
    found = []
    for contender in everyone:
        implementation = "reference" if contender.role == EAGER else contender.name
        can_be_auto = contender.role in (EAGER, OURS)
        is_auto = can_be_auto and session.auto[shared["op"]] == implementation
        row = session.row(contender, shared | {"pass": name, "auto": is_auto})
        if contender.status == TIMED:
            row |= _speed(contender.samples, name, cost, session.ceilings)
        found.append(row)
    for row in found:
        for role in (EAGER, COMPILE, PEER):
            row[f"over_{role}"] = speedup(row, [other for other in found if other["role"] == role])
    return found


def _speed(samples: Sequence[Sequence[float]], name: str, cost: Cost, ceilings: Ceilings) -> Row:
    """Time of a pass, the rates that follow from its least work, and its share of light."""
    work = cost.passes()[name]
    flops, num_bytes = ceilings.datasheet_flops, ceilings.datasheet_bytes
    datasheet = speed_of_light(work, flops, num_bytes) if flops and num_bytes else None
    summary = summarise(_seconds(samples, name))
    median = summary["seconds"]
    return summary | {
        "tflops": work.flops / median / 1e12,
        "gb_per_s": work.bytes / median / 1e9,
        "bound": bound(work, ceilings.flops, ceilings.bytes),
        "sol_measured": speed_of_light(work, ceilings.flops, ceilings.bytes) / median,
        "sol_datasheet": datasheet / median if datasheet else None,
    }


def _seconds(samples: Sequence[Sequence[float]], name: str) -> list[float]:
    """Seconds of each round in a pass; both is the sum of a round's stages."""
    if name == "both":
        return [sum(stages) for stages in zip(*samples, strict=True)]
    return list(samples[0 if name == "forward" else 1])


def _shapes(case: Case) -> str:
    return " ".join(
        "x".join(map(str, x.shape)) for x in case.arguments if isinstance(x, Tensor) and x.dim()
    )


def _configuration(op: Op, workload: Workload, row: Row, session: Session) -> Row:
    """Tile sizes, warps and stages of a timed Triton implementation."""
    is_triton = row["role"] == OURS and row["contender"].startswith("triton")
    if not is_triton or row["status"] != TIMED:
        return {}
    dtype, in_forward = session.runtime.dtype, row["pass"] == "forward"
    found = uses(op, row["contender"], workload, session.architecture, dtype)
    return {f"{u.config.kernel} {u.size}": u.entry for u in found if u.forward or not in_forward}
