"""Pretrain a base model.

python -m scripts.base_train --depth=12 --device_batch_size=8
torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth=20
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

import torch

from nanochat import configurator, scaling
from nanochat.common import Runtime, StopRequest, freeze_garbage, print0, setup_training
from nanochat.data.dataloader import CUDAPrefetcher, DataLoader
from nanochat.dataset import resolve_data_dir
from nanochat.eval.core import centred, evaluate_task
from nanochat.eval.core_bundle import CoreTask, get_bundle, load_tasks
from nanochat.eval.loss import evaluate_bpb
from nanochat.kernels.registry import format_choices, select
from nanochat.optim import schedule
from nanochat.profiler.throughput import Meter, console_line, peak_memory_gib
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.train import precision, run
from nanochat.train.run import due
from nanochat.train.step import set_rates, train_step

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
class Settings:
    """Pretrain a base model: every size follows from --depth unless it is given."""

    run: str = "dummy"  # name of the wandb run; "dummy" does not use wandb
    use_dummy_wandb: bool = False  # never use wandb, whatever the run is called
    dataset: str = "auto"  # embedded, fineweb-edu, climbmix, or auto: what is downloaded
    data_dir: str = ""  # folder of parquet, JSONL or text files to train on instead of a dataset
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    depth: int = 20  # transformer blocks
    n_kv_head: int = -1  # key/value heads (grouped queries); -1 is as many as query heads
    max_seq_len: int = 2048  # tokens of context
    num_iterations: int = -1  # optimizer steps; -1 derives them from the next two
    target_flops: float = -1.0  # FLOPs of the whole run; -1 derives them from the data ratio
    target_param_data_ratio: float = 20.0  # training tokens for each parameter
    device_batch_size: int = 32  # sequences a device holds at once; lower it when out of memory
    total_batch_size: int = 524_288  # tokens of one optimizer step over all devices
    embedding_lr: float = 0.2  # AdamW rate of the embedding at width 768
    unembedding_lr: float = 0.004  # AdamW rate of the head at width 768
    matrix_lr: float = 0.02  # Muon rate of the matrices
    newton_schulz: str = "muon"  # coefficients of Muon's Newton-Schulz: muon or polar_express
    weight_decay: float = 0.0  # decoupled decay of embedding and head
    grad_clip: float = 0.0  # largest global gradient norm; 0 does not clip
    warmup_ratio: float = 0.0  # share of the run in which the rates rise
    warmdown_ratio: float = 0.2  # share of the run in which the rates fall
    final_lr_frac: float = 0.0  # the rates at the very end, as a share of their peak
    eval_every: int = 250  # steps between validations; -1 validates only at the end
    eval_tokens: int = 20 * 524_288  # validation tokens
    core_metric_every: int = -1  # steps between evaluations of CORE, and at the end; -1 is never
    core_metric_max_per_task: int = 500  # examples of each CORE task; -1 is all
    core_bundle_dir: str = ""  # unpacked CORE bundle; empty downloads it to the base directory
    sample_every: int = 2000  # steps between samples; -1 samples only at the end
    save_every: int = -1  # steps between checkpoints; -1 saves only at the end
    keep_last: int = 2  # newest checkpoints kept; 0 keeps all
    model_tag: str = ""  # folder of the checkpoints; empty is d<depth>
    resume: bool = False  # go on from the newest checkpoint of the tag, if there is one
    resume_from: str = ""  # go on from this checkpoint: file, folder, tag or step
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    compile: bool = False  # torch.compile the model
    precision: str = "plain"  # plain: the compute dtype; mxfp4: block-scaled, experiments/mxfp4
    mx_recipe: str = ""  # recipe of --precision=mxfp4; empty is mx8f_mx4b
    mx_backend: str = ""  # native, an error where the GPU has no such products; or emulate
    mx_keep: str = ""  # layers left in the compute dtype: blocks.0,blocks.*.mlp.c_proj
    packing: str = "stream"  # stream, or bestfit: each row begins with a document
    skip_bad_shards: bool = False  # leave out unreadable shards instead of stopping
    token_cache: bool = False  # tokenize once, into <base dir>/token_cache, and read from there
    seed: int = 42  # of the weights


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device, settings.seed)
    stop = StopRequest()
    kernels = select(settings.kernels, runtime.device, runtime.dtype)
    print0(format_choices(kernels))

    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    data_dir = resolve_data_dir(settings.dataset, settings.data_dir, runtime.base_dir)
    accumulation = scaling.accumulation_steps(
        settings.total_batch_size,
        settings.device_batch_size,
        settings.max_seq_len,
        runtime.world_size,
    )
    config = run.model_config(
        settings.depth, settings.n_kv_head, settings.max_seq_len, tokenizer.get_vocab_size()
    )
    model = run.build_model(config, runtime, settings.seed)
    numerics = precision.prepare(settings.precision, model, runtime, asdict(settings))
    record = {
        "kernels": run.choices_record(kernels),
        "precision": numerics.record,
        "data_dir": str(data_dir),
    }
    meter = build_meter(settings, model.num_parameters().total, model.estimate_flops, runtime)
    meter.emulated = numerics.emulated
    state, tracker = run.open_run(
        "base",
        settings.model_tag or f"d{settings.depth}",
        model,
        meter,
        settings,
        runtime,
        record,
        meta={"tokenizer_fingerprint": tokenizer.fingerprint()},
        run="dummy" if settings.use_dummy_wandb else settings.run,
    )
    trained = model
    if settings.compile:
        trained = cast(torch.nn.Module, torch.compile(model, dynamic=False))
    plan = {
        "depth": settings.depth,
        "num_params": model.num_parameters().total,
        "num_iterations": meter.num_iterations,
        "total_batch_size": settings.total_batch_size,
        "accumulation_steps": accumulation,
        "world_size": runtime.world_size,
        "flops_per_token_causal": meter.flops_causal,
        "flops_per_token_nanochat": meter.flops_nanochat,
        "peak_flops_datasheet": meter.peaks.datasheet,
        "peak_flops_measured": meter.peaks.measured_gemm,
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }
    tracker.log("plan", state.step, **plan)
    print0(" | ".join(f"{name} {value}" for name, value in plan.items()))

    def loader(split: str, loader_state: dict | None = None) -> CUDAPrefetcher:
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

    def validate() -> float:
        micro_batch = settings.device_batch_size * settings.max_seq_len * runtime.world_size
        batches = loader("val")
        pairs = ((batch.inputs, batch.targets) for batch in batches)
        num_batches = max(1, settings.eval_tokens // micro_batch)
        bpb = evaluate_bpb(trained, itertools.islice(pairs, num_batches), token_bytes, runtime)
        batches.close()
        return bpb

    def sample() -> None:
        for prompt in SAMPLE_PROMPTS:
            ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
            text = tokenizer.decode([*ids, *model.generate(ids, SAMPLE_TOKENS, temperature=0)])
            tracker.log("sample", state.step, prompt=prompt, text=text)
            print0(f"  {text!r}")

    core_tasks = load_core_tasks(settings, runtime)

    def core_metric() -> float:
        scores = []
        for task in core_tasks:
            accuracy = evaluate_task(
                model, tokenizer, task, runtime, max_per_task=settings.core_metric_max_per_task
            )
            scores.append(centred(accuracy, task.guessing_percent))
        return fmean(scores)

    started = time.perf_counter()
    batches = loader("train", state.loader_state)
    freeze_garbage()
    while True:
        step = state.step
        last = step >= meter.num_iterations
        if last or due(step, settings.save_every):
            state.save(runtime, settings.keep_last)
        if last or step == 0 or due(step, settings.eval_every):
            bpb = validate()
            state.min_bpb = min(state.min_bpb, bpb)
            tracker.log("eval", step, split="val", bpb=bpb)
            print0(f"step {step:05d} | validation bpb {bpb:.4f}")
        if core_tasks and (last or due(step, settings.core_metric_every)):
            core = core_metric()
            tracker.log("core", step, core=core, max_per_task=settings.core_metric_max_per_task)
            print0(f"step {step:05d} | CORE {core:.4f}")
        if runtime.is_main and (last or due(step, settings.sample_every)):
            sample()
        if last or stop.agreed(runtime):
            break

        numerics.begin_step(step)
        before = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        state.loader_state = micro_batches[-1].state
        scale = schedule.lr_scale(
            step,
            meter.num_iterations,
            settings.warmup_ratio,
            settings.warmdown_ratio,
            settings.final_lr_frac,
        )
        set_rates(state.optimizers, scale, schedule.muon_momentum(step))
        pairs = [(batch.inputs, batch.targets) for batch in micro_batches]
        result = train_step(trained, state.optimizers, pairs, runtime, settings.grad_clip)
        loss, grad_norm = result.loss.item(), result.grad_norm.item()
        values = meter.update(step, loss, time.perf_counter() - before)
        values |= {"grad_norm": grad_norm, "lr_scale": scale}
        values |= {"memory_gib": peak_memory_gib(runtime)}
        tracker.log("train", step, **values)
        print0(console_line(step, meter.num_iterations, values))
        state.check_finite(loss, grad_norm, runtime)
        state.step += 1

    batches.close()
    early = None if last else stop
    state.finish(tracker, runtime, early, settings.keep_last, started, min_bpb=state.min_bpb)


def load_core_tasks(settings: Settings, runtime: Runtime) -> list[CoreTask]:
    """The tasks of CORE, none if it is never evaluated."""
    if settings.core_metric_every <= 0:
        return []
    return load_tasks(Path(settings.core_bundle_dir or get_bundle(runtime.base_dir)))


def build_meter(
    settings: Settings, num_parameters: int, estimate_flops: Callable[[bool], int], runtime: Runtime
) -> Meter:
    """The horizon and what each step is measured against."""
    num_iterations = scaling.num_iterations(
        settings.num_iterations,
        settings.target_flops,
        settings.target_param_data_ratio,
        settings.total_batch_size,
        num_parameters,
        estimate_flops(False),
    )
    return Meter(
        settings.total_batch_size,
        estimate_flops(True),
        estimate_flops(False),
        run.device_peaks(runtime),
        runtime.world_size,
        num_iterations,
    )


if __name__ == "__main__":
    main()
