"""Supervised fine-tuning: only what the assistant says is learned, one conversation a row.

python -m scripts.chat_sft --mid_checkpoint=mid_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

import itertools
import time
from dataclasses import dataclass
from typing import cast

import torch

from nanochat import configurator, scaling
from nanochat.common import StopRequest, freeze_garbage, print0, setup_training
from nanochat.data.conversation_loader import ConversationLoader
from nanochat.data.dataloader import CUDAPrefetcher
from nanochat.eval.loss import evaluate_loss
from nanochat.eval.tasks import evaluate_categorical
from nanochat.kernels.registry import format_choices, select
from nanochat.optim import schedule
from nanochat.profiler.throughput import Meter, console_line, peak_memory_gib
from nanochat.text.tokenizer import get_tokenizer
from nanochat.train import run
from nanochat.train.run import due
from nanochat.train.step import set_rates, train_step
from tasks.mixtures import sft_mixture
from tasks.registry import get_evaluated_task, sft_test_names


@dataclass(frozen=True)
class Settings:
    """Fine-tune a mid-trained model on the assistant's side of conversations."""

    mid_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: str = "mid"  # stage of the checkpoint: mid, or base to leave mid-training out
    mixture: str = "full"  # full: ARC, GSM8K, SmolTalk, identity, spelling; local: without a Hub
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    run: str = "dummy"  # name of the wandb run; "dummy" does not use wandb
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    num_iterations: int = -1  # optimizer steps; -1 derives them from the next one
    num_epochs: int = 1  # passes over the mixture
    device_batch_size: int = 4  # rows a device holds at once; lower it when out of memory
    target_examples_per_step: int = 32  # rows of one optimizer step over all devices
    packing: str = "padded"  # padded: a conversation a row; packed: as many as fit
    embedding_lr: float = 0.2  # AdamW rate of the embedding at width 768
    unembedding_lr: float = 0.004  # AdamW rate of the head at width 768
    matrix_lr: float = 0.02  # Muon rate of the matrices
    newton_schulz: str = "muon"  # coefficients of Muon's Newton-Schulz: muon or polar_express
    init_lr_frac: float = 0.02  # share of these rates to start from
    weight_decay: float = 0.0  # decoupled decay of embedding and head
    grad_clip: float = 0.0  # largest global gradient norm; 0 does not clip
    eval_every: int = 100  # steps between validations; -1 validates only at the end
    eval_steps: int = 100  # batches of a validation
    eval_metrics_every: int = 200  # steps between multiple-choice tests; -1 tests only at the end
    eval_metrics_max_problems: int = 1024  # problems of each test; 0 tests nothing
    save_every: int = -1  # steps between checkpoints; -1 saves only at the end
    keep_last: int = 2  # newest checkpoints kept; 0 keeps all
    model_tag: str = ""  # folder of the checkpoints; empty is the source model's
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
    model, parent_meta, parent_path = run.load_pretrained(
        settings.mid_checkpoint, settings.source, runtime, tokenizer
    )
    train_data = sft_mixture(settings.mixture, "train", settings.task_data)
    val_data = sft_mixture(settings.mixture, "test", settings.task_data)
    tests = {}
    if settings.mixture == "full" and settings.eval_metrics_max_problems > 0:
        tests = {name: get_evaluated_task(name, settings.task_data) for name in sft_test_names()}
    sequence_len = model.config.sequence_len
    accumulation = scaling.accumulation_steps(
        settings.target_examples_per_step, settings.device_batch_size, 1, runtime.world_size
    )
    num_iterations = settings.num_iterations
    if num_iterations == -1:
        rows = settings.num_epochs * len(train_data)
        num_iterations = max(1, rows // settings.target_examples_per_step)
    meter = Meter(
        settings.target_examples_per_step * sequence_len,
        model.estimate_flops(causal=True),
        model.estimate_flops(causal=False),
        run.device_peaks(runtime),
        runtime.world_size,
        num_iterations,
    )
    state, tracker = run.open_run(
        "chatsft",
        settings.model_tag or parent_meta["tag"],
        model,
        meter,
        settings,
        runtime,
        record={"kernels": run.choices_record(kernels), "parent": str(parent_path)},
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
        examples_per_step=settings.target_examples_per_step,
        world_size=runtime.world_size,
    )
    print0(f"{len(train_data):,} conversations, {num_iterations:,} steps")

    def loader(data, loader_state: dict | None = None) -> CUDAPrefetcher:
        batches = ConversationLoader(
            data,
            tokenizer,
            settings.device_batch_size,
            sequence_len,
            settings.packing,
            runtime.rank,
            runtime.world_size,
            loader_state,
        )
        return CUDAPrefetcher(batches, runtime.device)

    def validate() -> float:
        batches = loader(val_data)
        pairs = ((batch.inputs, batch.targets) for batch in batches)
        loss = evaluate_loss(trained, itertools.islice(pairs, settings.eval_steps), runtime)
        batches.close()
        return loss

    def test() -> None:
        for name, task in tests.items():
            result = evaluate_categorical(
                model,
                tokenizer,
                task,
                runtime,
                batch_size=2 * settings.device_batch_size,
                max_problems=settings.eval_metrics_max_problems,
            )
            tracker.log("task", state.step, task=name, accuracy=result.accuracy)
            print0(f"step {state.step:05d} | {name} {result.accuracy:.4f}")

    started = time.perf_counter()
    batches = loader(train_data, state.loader_state)
    freeze_garbage()
    while True:
        step = state.step
        last = step >= num_iterations
        if last or due(step, settings.save_every):
            state.save(runtime, settings.keep_last)
        if last or step == 0 or due(step, settings.eval_every):
            val_loss = validate()
            tracker.log("eval", step, split="val", loss=val_loss)
            print0(f"step {step:05d} | validation loss {val_loss:.4f}")
        if tests and (last or due(step, settings.eval_metrics_every)):
            test()
        if last or stop.agreed(runtime):
            break

        before = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        state.loader_state = micro_batches[-1].state
        scale = schedule.lr_scale(step, num_iterations, 0.0, 1.0, 0.0)
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
    state.finish(tracker, runtime, early, settings.keep_last, started)


if __name__ == "__main__":
    main()
