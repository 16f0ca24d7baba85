"""Mid-training: the base model meets conversations, tools and multiple choice.

python -m scripts.mid_train --base_checkpoint=base_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

import itertools
import time
from dataclasses import dataclass
from typing import cast

import torch

from nanochat import configurator, scaling
from nanochat.common import StopRequest, freeze_garbage, print0, setup_training
from nanochat.data.conversation_loader import ConversationLoader, estimate_tokens
from nanochat.data.dataloader import CUDAPrefetcher
from nanochat.eval.loss import evaluate_bpb
from nanochat.kernels.registry import format_choices, select
from nanochat.optim import schedule
from nanochat.profiler.throughput import Meter, console_line, peak_memory_gib
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.train import run
from nanochat.train.run import due
from nanochat.train.step import set_rates, train_step
from tasks.mixtures import mid_mixture


@dataclass(frozen=True)
class Settings:
    """Train a base model on the token stream of conversations."""

    base_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    mixture: str = "full"  # full: SmolTalk, MMLU, GSM8K, identity, spelling; local: without a Hub
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    run: str = "dummy"  # name of the wandb run; "dummy" does not use wandb
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    num_iterations: int = -1  # optimizer steps; -1 is one pass over the mixture
    device_batch_size: int = 32  # sequences a device holds at once; lower it when out of memory
    total_batch_size: int = 524_288  # tokens of one optimizer step over all devices
    embedding_lr: float = 0.2  # AdamW rate of the embedding at width 768
    unembedding_lr: float = 0.004  # AdamW rate of the head at width 768
    matrix_lr: float = 0.02  # Muon rate of the matrices
    newton_schulz: str = "muon"  # coefficients of Muon's Newton-Schulz: muon or polar_express
    init_lr_frac: float = 1.0  # share of these rates to start from
    weight_decay: float = 0.0  # decoupled decay of embedding and head
    grad_clip: float = 0.0  # largest global gradient norm; 0 does not clip
    warmdown_ratio: float = 0.2  # share of the run in which the rates fall to 0
    eval_every: int = 150  # steps between validations; -1 validates only at the end
    eval_tokens: int = 20 * 524_288  # validation tokens
    save_every: int = -1  # steps between checkpoints; -1 saves only at the end
    keep_last: int = 2  # newest checkpoints kept; 0 keeps all
    model_tag: str = ""  # folder of the checkpoints; empty is the base model's
    resume: bool = False  # go on from the newest checkpoint of the tag, if there is one
    resume_from: str = ""  # go on from this checkpoint: file, folder, tag or step
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    compile: bool = False  # torch.compile the model
    seed: int = 42  # of everything random


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device, settings.seed)
    stop = StopRequest()
    kernels = select(settings.kernels, runtime.device, runtime.dtype)
    print0(format_choices(kernels))

    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    model, base_meta, base_path = run.load_pretrained(
        settings.base_checkpoint, "base", runtime, tokenizer
    )
    train_data = mid_mixture(settings.mixture, "train", settings.task_data)
    val_data = mid_mixture(settings.mixture, "test", settings.task_data)
    sequence_len = model.config.sequence_len
    accumulation = scaling.accumulation_steps(
        settings.total_batch_size, settings.device_batch_size, sequence_len, runtime.world_size
    )
    num_iterations = settings.num_iterations
    if num_iterations == -1:
        epoch_tokens = estimate_tokens(tokenizer, train_data)
        num_iterations = max(1, epoch_tokens // settings.total_batch_size)
    meter = Meter(
        settings.total_batch_size,
        model.estimate_flops(causal=True),
        model.estimate_flops(causal=False),
        run.device_peaks(runtime),
        runtime.world_size,
        num_iterations,
    )
    state, tracker = run.open_run(
        "mid",
        settings.model_tag or base_meta["tag"],
        model,
        meter,
        settings,
        runtime,
        record={"kernels": run.choices_record(kernels), "parent": str(base_path)},
        meta={"tokenizer_fingerprint": tokenizer.fingerprint()},
        init_lr_frac=settings.init_lr_frac,
        run=settings.run,
    )
    trained = model
    if settings.compile:
        trained = cast(torch.nn.Module, torch.compile(model, dynamic=False))
    tracker.log(
        "plan",
        state.step,
        num_iterations=num_iterations,
        num_conversations=len(train_data),
        total_batch_size=settings.total_batch_size,
        world_size=runtime.world_size,
    )
    print0(f"{len(train_data):,} conversations, {num_iterations:,} steps")

    def loader(data, loader_state: dict | None = None) -> CUDAPrefetcher:
        batches = ConversationLoader(
            data,
            tokenizer,
            settings.device_batch_size,
            sequence_len,
            "stream",
            runtime.rank,
            runtime.world_size,
            loader_state,
        )
        return CUDAPrefetcher(batches, runtime.device)

    def validate() -> float:
        micro_batch = settings.device_batch_size * sequence_len * runtime.world_size
        batches = loader(val_data)
        pairs = ((batch.inputs, batch.targets) for batch in batches)
        num_batches = max(1, settings.eval_tokens // micro_batch)
        bpb = evaluate_bpb(trained, itertools.islice(pairs, num_batches), token_bytes, runtime)
        batches.close()
        return bpb

    started = time.perf_counter()
    batches = loader(train_data, state.loader_state)
    freeze_garbage()
    while True:
        step = state.step
        last = step >= num_iterations
        if last or due(step, settings.save_every):
            state.save(runtime, settings.keep_last)
        if last or step == 0 or due(step, settings.eval_every):
            bpb = validate()
            state.min_bpb = min(state.min_bpb, bpb)
            tracker.log("eval", step, split="val", bpb=bpb)
            print0(f"step {step:05d} | validation bpb {bpb:.4f}")
        if last or stop.agreed(runtime):
            break

        before = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        state.loader_state = micro_batches[-1].state
        scale = schedule.lr_scale(step, num_iterations, 0.0, settings.warmdown_ratio, 0.0)
        set_rates(state.optimizers, scale, schedule.muon_momentum(step))
        pairs = [(batch.inputs, batch.targets) for batch in micro_batches]
        result = train_step(trained, state.optimizers, pairs, runtime, settings.grad_clip)
        loss, grad_norm = result.loss.item(), result.grad_norm.item()
        values = meter.update(step, loss, time.perf_counter() - before)
        values |= {"grad_norm": grad_norm, "lr_scale": scale}
        values |= {"memory_gib": peak_memory_gib(runtime)}
        tracker.log("train", step, **values)
        print0(console_line(step, num_iterations, values))
        state.check_finite(loss, grad_norm, runtime)
        state.step += 1

    batches.close()
    early = None if last else stop
    state.finish(tracker, runtime, early, settings.keep_last, started, min_bpb=state.min_bpb)


if __name__ == "__main__":
    main()
