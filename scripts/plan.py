"""Foresee a training run: memory by part, the largest batch, tokens a second, hours and cost.

python -m scripts.plan --depth=20
python -m scripts.plan --depth=20 --gpu=H100 --num_gpus=8
python -m scripts.plan configs/dual_gpu/d20_32gb.py --gpu="RTX 5090" --num_gpus=2
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from nanochat import command, configurator, hardware, scaling
from nanochat.hardware import Hardware
from nanochat.profiler.activations import Setup
from nanochat.profiler.forecast import Span
from nanochat.profiler.plan import Plan, Run, assumptions, foresee_kernels, make_plan
from nanochat.settings import (
    AUTO,
    Choices,
    Count,
    CountOrAuto,
    CountOrMinusOne,
    NonNegative,
    PositiveOrMinusOne,
    near_miss,
)
from nanochat.train.rehearsal import count_memory
from nanochat.train.run import model_config

GIB = 2**30
DEEPEST = 64  # of the depths that --budget looks at


@dataclass(frozen=True)
class Settings:
    """Foresee a training run on every GPU of the table, or on one; nothing here is measured."""

    OTHER_CONFIGS = True  # those of base_train say what a run is

    gpu: str = ""  # name, such as H100 or "RTX 5090"; empty is every GPU of the table
    num_gpus: Count = 1  # of that model in one machine
    gpu_memory_gib: PositiveOrMinusOne = -1.0  # of each, where other programs use some; -1 is all
    dollars_per_hour: NonNegative = 0.0  # price of one GPU; 0 takes the table's, where one is cited
    target: Annotated[str, Choices(("none", "hours", "dollars", "bpb"))] = "none"  # sort by this
    budget: PositiveOrMinusOne = -1.0  # hours or dollars of --target: the largest depth within; -1
    depth: Count = 20  # transformer blocks
    n_kv_head: CountOrMinusOne = -1  # key/value heads (grouped queries); -1: as many as query heads
    max_seq_len: Count = 2048  # tokens of context
    vocab_size: Count = 65_536  # of the tokenizer
    device_batch_size: CountOrAuto = AUTO  # sequences a device holds at once; auto: all that fit
    total_batch_size: Count = 524_288  # tokens of one optimizer step over all devices
    num_iterations: CountOrMinusOne = -1  # optimizer steps; -1 derives them from the next two
    target_flops: PositiveOrMinusOne = -1.0  # FLOPs of the whole run; -1 takes the data ratio
    target_param_data_ratio: PositiveOrMinusOne = 20.0  # training tokens for each parameter
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    count: bool = False  # with --gpu: also count the memory of a step on the meta device
    json: bool = False  # print JSON instead of tables

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be foreseen, or settings that contradict each other."""
        if self.target == "bpb":
            raise ValueError(
                "--target=bpb: the loss of a run is not known yet, because no scaling law has been "
                "fitted to runs of this model; run python -m scripts.base_train at several depths "
                "first (--depth=4, --depth=8, --depth=12) and compare their validation bpb"
            )
        if self.budget != -1 and self.target == "none":
            raise ValueError(
                f"--budget={self.budget:g} of what? Say --target=hours or --target=dollars"
            )
        if self.count and not self.gpu:
            raise ValueError("--count counts for one GPU: name it with --gpu")


def main() -> None:
    settings = configurator.load(Settings)
    gpus = [find_gpu(settings.gpu)] if settings.gpu else list(hardware.GPUS)
    if settings.budget == -1:
        plans = [plan_on(settings, gpu) for gpu in gpus]
    else:
        plans = [plan for gpu in gpus if (plan := within_budget(settings, gpu)) is not None]
    if settings.target != "none":
        plans.sort(key=lambda plan: amount(settings, plan))
    if settings.json:
        print(json.dumps([plan.record(price(settings)) for plan in plans], indent=1))
        return
    print(f"# Forecast, not measured: {title(settings)}\n")
    if not plans:
        print(f"No depth fits {settings.budget:g} {settings.target} there.")
    elif settings.gpu:
        print(f"{summary(settings, plans[0])}\n\n{one_gpu(settings, plans[0])}")
    else:
        print(all_gpus(settings, plans))
    print("\nAssumptions:\n" + "\n".join(f"- {line}" for line in assumptions()))
    if plans and settings.dollars_per_hour == 0:
        sources = {(plan.gpu.name, plan.gpu.rental_source) for plan in plans if plan.gpu.rental}
        for name, source in sorted(sources):
            print(f"- price of {name}: {source}")


def find_gpu(name: str) -> Hardware:
    """The row of a GPU. Raises ValueError with the nearest name where there is none."""
    gpu = hardware.lookup(name)
    if gpu is None:
        names = [gpu.alias or gpu.name for gpu in hardware.GPUS]
        raise ValueError(f"--gpu={name!r} is not in the table{near_miss(name, names)}")
    return gpu


def plan_on(settings: Settings, gpu: Hardware) -> Plan:
    """The run of the settings on one GPU model."""
    config = model_config(
        settings.depth, settings.n_kv_head, settings.max_seq_len, settings.vocab_size
    )
    kernels = foresee_kernels(settings.kernels, gpu)
    setup = Setup(config, 1, kernels, world_size=settings.num_gpus, architecture=gpu.architecture)
    count = setup.parameters
    steps = scaling.num_iterations(
        settings.num_iterations,
        settings.target_flops,
        settings.target_param_data_ratio,
        settings.total_batch_size,
        count.total,
        Run(setup, settings.total_batch_size, 1).flops_per_token[1],
    )
    run = Run(setup, settings.total_batch_size, steps)
    batch = None if settings.device_batch_size == AUTO else settings.device_batch_size
    return make_plan(run, gpu, batch, settings.gpu_memory_gib)


def amount(settings: Settings, plan: Plan) -> float:
    """Hours or dollars at the slow end; infinite where they are not known."""
    span = plan.hours if settings.target == "hours" else plan.dollars(price(settings))
    return float("inf") if span is None else span.slow


def within_budget(settings: Settings, gpu: Hardware) -> Plan | None:
    """The deepest model whose run surely ends within the budget; None if there is none."""
    fitting = None
    for depth in range(1, DEEPEST + 1):
        plan = plan_on(replace(settings, depth=depth), gpu)
        if amount(settings, plan) > settings.budget:
            break
        fitting = plan
    return fitting


def price(settings: Settings) -> float | None:
    """The user's price of one GPU, None where the table's holds."""
    return settings.dollars_per_hour or None


def title(settings: Settings) -> str:
    """What is foreseen, in a line."""
    if settings.budget != -1:
        what = f"the largest depth within {settings.budget:g} {settings.target}"
    else:
        what = f"d{settings.depth}"
    gpus = "GPU" if settings.num_gpus == 1 else "GPUs"
    return (
        f"{what}, {settings.max_seq_len} tokens of context, {settings.total_batch_size:,} tokens a "
        f"step, kernels={settings.kernels}, {settings.num_gpus} {gpus}"
    )


def span(found: Span | None, form: Callable[[float], str]) -> str:
    """Both ends, the smaller number first; "unknown" where there are none."""
    if found is None:
        return "unknown"
    low, high = sorted((found.slow, found.fast))
    return f"{form(low)} to {form(high)}" if form(low) != form(high) else form(low)


def cells(settings: Settings, plan: Plan) -> list[str]:
    """Batch, memory, rate, MFU, hours and cost of a plan, in words."""
    gib = f"{plan.memory.total / GIB:.1f}"
    batch = str(plan.setup.device_batch_size)
    if not plan.fits:
        return [f"{batch} does not fit", gib, "", "", "", ""]
    return [
        batch,
        gib,
        span(plan.tokens_per_second, lambda x: f"{x:,.0f}"),
        span(plan.mfu, lambda x: f"{x:.0%}"),
        span(plan.hours, lambda x: f"{x:.3g}"),
        span(plan.dollars(price(settings)), lambda x: f"${x:,.2f}" if x < 100 else f"${x:,.0f}"),
    ]


COLUMNS = ("device_batch_size", "peak GiB", "tokens/s", "MFU", "hours", "cost")


def all_gpus(settings: Settings, plans: Sequence[Plan]) -> str:
    """A row for each GPU."""
    rows = [
        [
            plan.gpu.alias or plan.gpu.name,
            f"{plan.gpu.memory_gib:g}",
            str(plan.setup.model.n_layer),
            *cells(settings, plan),
        ]
        for plan in plans
    ]
    return markdown(("forecast", "GiB", "depth", *COLUMNS), rows)


def summary(settings: Settings, plan: Plan) -> str:
    """The forecast in a line, as the configs of configs/dual_gpu carry it."""
    batch, peak, rate, _, hours, _ = cells(settings, plan)
    memory = f"forecast: batch {batch}, {peak} of {plan.usable / GIB:.1f} GiB"
    return f"{memory}, {rate} tokens/s, {hours} hours" if plan.fits else memory


def one_gpu(settings: Settings, plan: Plan) -> str:
    """The run, then its memory and its time by part."""
    setup, run = plan.setup, plan.run
    count, flops = setup.parameters, run.flops_per_token
    tokens = run.total_batch_size * run.num_iterations
    facts = [
        ("GPU", plan.gpu.name),
        ("depth", setup.model.n_layer),
        ("parameters", f"{count.total:,}"),
        ("optimizer steps", f"{run.num_iterations:,} of {setup.micro_batches} micro-batches"),
        ("tokens", f"{tokens:,}"),
        ("FLOPs a token, causal / nanochat's formula", f"{flops[0]:.4g} / {flops[1]:.4g}"),
        ("FLOPs of the run, causal", f"{flops[0] * tokens:.3g}"),
        ("GiB for tensors on each GPU", f"{plan.usable / GIB:.1f}"),
        *zip(COLUMNS, cells(settings, plan), strict=True),
    ]
    tables = [markdown(("forecast", ""), facts), memory_table(settings, plan)]
    if plan.slow and plan.fast:
        times = [
            (name.replace("_", " "), f"{1e3 * vars(plan.fast)[name]:.1f}", f"{1e3 * slow:.1f}")
            for name, slow in (*vars(plan.slow).items(),)
        ]
        total = ("step", f"{1e3 * plan.fast.total:.1f}", f"{1e3 * plan.slow.total:.1f}")
        tables.append(markdown(("forecast: ms of a step", "fast", "slow"), [*times, total]))
    return "\n\n".join(tables)


def memory_table(settings: Settings, plan: Plan) -> str:
    """Bytes by part, and beside them those of a step on the meta device, where that is wanted."""
    memory = plan.memory
    head = f"forecast: memory at the peak ({memory.peak_moment}), MiB"
    foreseen = {**memory.peak, "all": memory.total}
    kept = {f"kept by {op}": size for op, size in memory.activations.items()}
    if not settings.count:
        rows = [(name, mib(size)) for name, size in (foreseen | kept).items()]
        return markdown((head, ""), rows)
    # one micro-batch more than the first shows the gradients of earlier ones; others are the same
    batches = min(plan.setup.micro_batches, 2)
    setup = plan.setup
    report = count_memory(
        model_config(
            setup.model.n_layer, settings.n_kv_head, settings.max_seq_len, settings.vocab_size
        ),
        setup.device_batch_size,
        setup.kernels,
        micro_batches=batches,
        architecture=setup.architecture,
    )
    counted = {**report.peak, "all": sum(report.peak.values())}
    counted |= {f"kept by {op}": size for op, size in report.by_operation().items()}
    names = dict.fromkeys([*foreseen, *counted, *kept])
    rows = [
        (name, mib((foreseen | kept).get(name, 0)), mib(counted.get(name, 0))) for name in names
    ]
    return markdown((head, "foreseen", f"counted on one GPU ({report.peak_moment})"), rows)


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose columns line up on a console too."""
    lines = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])


if __name__ == "__main__":
    command.run(main)
