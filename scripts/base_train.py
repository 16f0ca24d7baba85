"""Pretrain a base model.

python -m scripts.base_train --depth=12 --device_batch_size=8
torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth=20
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nanochat import command, configurator, scaling
from nanochat.common import Runtime, freeze_garbage, print0
from nanochat.data.dataloader import CUDAPrefetcher, DataLoader
from nanochat.data.shards import list_shards
from nanochat.dataset import resolve_data_dir
from nanochat.eval.core import centred, evaluate_task
from nanochat.eval.core_bundle import CoreTask, get_bundle, load_tasks
from nanochat.eval.loss import evaluate_bpb
from nanochat.gpt import GPT
from nanochat.optim import schedule
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.train import auto_batch, precision, run
from nanochat.train.pretraining import PretrainingSettings
from nanochat.train.run import due
from nanochat.train.session import Session, compiled, first_batches, launch
from nanochat.train.step import train_step

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The planets of the solar system are:",
    "The function returns",
    "def __init__(self",
    "import os\n",
)
SAMPLE_TOKENS = 16


@dataclass(frozen=True)
class Settings(PretrainingSettings):
    """Pretrain a base model: every size follows from --depth unless it is given."""


def main() -> None:
    # Settings: what this run is, where it runs, and which kernels it uses.
    settings = configurator.load(Settings)
    runtime, kernels = launch(settings)

    # Build: text, tokenizer, model, optimizers, records. Whatever is missing shows before the model
    # is built, in the order in which a person would provide it.
    data_dir = resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir)
    list_shards(data_dir)
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    core_tasks = load_core_tasks(settings, runtime)
    scaling.accumulation_steps(
        settings.total_batch_size,
        max(1, settings.device_batch_size),
        settings.max_seq_len,
        runtime.world_size,
    )
    config = run.model_config(
        settings.depth, settings.n_kv_head, settings.max_seq_len, tokenizer.get_vocab_size()
    )
    model = run.build_model(config, runtime, settings.seed)
    numerics = precision.prepare(settings.precision, model, runtime, asdict(settings))
    session = Session(
        "base",
        settings.model_tag or f"d{settings.depth}",
        model,
        tokenizer,
        settings,
        runtime,
        kernels,
        tokens_per_step=settings.total_batch_size,
        num_iterations=horizon(settings, model),
        record={"precision": numerics.record, "data_dir": str(data_dir)},
        wandb_run="dummy" if settings.use_dummy_wandb else "",
    )
    state, meter = session.state, session.meter
    meter.emulated = numerics.emulated
    trained = compiled(model, settings.compile)
    settings, accumulation = auto_batch.resolved(
        settings, settings.total_batch_size, model, trained, runtime, kernels
    )
    session.log_plan(
        depth=settings.depth,
        num_params=model.num_parameters().total,
        num_iterations=session.num_iterations,
        total_batch_size=settings.total_batch_size,
        device_batch_size=settings.device_batch_size,
        accumulation_steps=accumulation,
        world_size=runtime.world_size,
        flops_per_token_causal=meter.flops_causal,
        flops_per_token_nanochat=meter.flops_nanochat,
        peak_flops_datasheet=meter.peaks.datasheet,
        peak_flops_measured=meter.peaks.measured_gemm,
        dtype=str(runtime.dtype).removeprefix("torch."),
    )
    micro_batch = settings.device_batch_size * settings.max_seq_len * runtime.world_size
    eval_batches = max(1, settings.eval_tokens // micro_batch)

    def open_loader(split: str, loader_state: dict[str, Any] | None = None) -> CUDAPrefetcher:
        batches = DataLoader(
            tokenizer,
            data_dir,
            split,
            settings.device_batch_size,
            settings.max_seq_len,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            packing=settings.packing,
            state=loader_state,
            skip_bad_shards=settings.skip_bad_shards,
            token_cache=runtime.base_dir / "token_cache" if settings.token_cache else None,
        )
        return CUDAPrefetcher(batches, runtime.device)

    # Loop: N steps have N + 1 gaps around them. Saving and evaluating happen in the gaps, so the
    # last pass through the loop evaluates the finished model and trains no more.
    batches = open_loader("train", state.loader_state)
    freeze_garbage()
    while not session.stopped:
        step, last = session.step, session.is_last
        # a checkpoint comes first: an evaluation may take long, and a kill must not cost the steps
        if last or due(step, settings.save_every):
            session.save()
        if last or step == 0 or due(step, settings.eval_every):
            with session.evaluation("validation"):
                pairs = first_batches(open_loader("val"), eval_batches)
                bpb = evaluate_bpb(trained, pairs, token_bytes, runtime)
                state.min_bpb = min(state.min_bpb, bpb)
                session.log("eval", f"validation bpb {bpb:.4f}", split="val", bpb=bpb)
        if core_tasks and (last or due(step, settings.core_metric_every)):
            with session.evaluation("CORE"):
                max_per_task = settings.core_metric_max_per_task
                core = core_metric(model, tokenizer, core_tasks, runtime, max_per_task)
                session.log("core", f"CORE {core:.4f}", core=core, max_per_task=max_per_task)
        if runtime.is_main and (last or due(step, settings.sample_every)):
            with session.evaluation("sampling"):
                print_samples(model, tokenizer, session)
        if last or session.stopped:
            break

        # one optimizer step: the batches are counted in its time, because waiting for data is
        # part of what a step costs
        with session.training():
            numerics.begin_step(step)
            begun = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            scale = schedule.lr_scale(
                step,
                session.num_iterations,
                settings.warmup_ratio,
                settings.warmdown_ratio,
                settings.final_lr_frac,
            )
            session.set_rates(scale)
            pairs = [(batch.inputs, batch.targets) for batch in micro_batches]
            result = train_step(trained, state.optimizers, pairs, runtime, settings.grad_clip)
            state.loader_state = micro_batches[-1].state  # not before: a signal may undo the step
            session.log_step(result, begun, scale)

    batches.close()
    session.finish(min_bpb=state.min_bpb)


def horizon(settings: Settings, model: GPT) -> int:
    """Optimizer steps of the run."""
    return scaling.num_iterations(
        settings.num_iterations,
        settings.target_flops,
        settings.target_param_data_ratio,
        settings.total_batch_size,
        model.num_parameters().total,
        model.estimate_flops(causal=False),
    )


def load_core_tasks(settings: Settings, runtime: Runtime) -> list[CoreTask]:
    """The tasks of CORE, none if it is never evaluated."""
    if settings.core_metric_every <= 0:
        return []
    if settings.core_bundle_dir:
        return load_tasks(Path(settings.core_bundle_dir))
    return load_tasks(get_bundle(runtime.base_dir, sha256=settings.core_bundle_sha256))


def core_metric(
    model: GPT, tokenizer: Tokenizer, tasks: list[CoreTask], runtime: Runtime, max_per_task: int
) -> float:
    """Mean centred accuracy over the tasks."""
    scores = []
    for task in tasks:
        accuracy = evaluate_task(model, tokenizer, task, runtime, max_per_task=max_per_task)
        scores.append(centred(accuracy, task.guessing_percent))
    return fmean(scores)


def print_samples(model: GPT, tokenizer: Tokenizer, session: Session) -> None:
    """Continue every prompt greedily, so that samples of two steps differ by the weights alone."""
    for prompt in SAMPLE_PROMPTS:
        ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
        text = tokenizer.decode([*ids, *model.generate(ids, SAMPLE_TOKENS, temperature=0)])
        session.tracker.log("sample", session.step, prompt=prompt, text=text)
        print0(f"  {text!r}")


if __name__ == "__main__":
    command.run(main)
