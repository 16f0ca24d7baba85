"""Mid-training: the base model meets conversations, tools and multiple choice.

python -m scripts.mid_train --base_checkpoint=base_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

import time
from dataclasses import dataclass
from typing import Annotated, Any

from nanochat import command, configurator, scaling
from nanochat.common import freeze_garbage
from nanochat.data.conversation_loader import ConversationLoader, estimate_tokens
from nanochat.data.dataloader import CUDAPrefetcher
from nanochat.eval.loss import evaluate_bpb
from nanochat.optim import schedule
from nanochat.settings import Choices, Count, CountOrMinusOne, NonNegative, Share
from nanochat.text.tokenizer import get_token_bytes, get_tokenizer
from nanochat.train import run
from nanochat.train.run import due
from nanochat.train.session import Session, TrainingSettings, compiled, first_batches, launch
from nanochat.train.step import train_step
from tasks.common import TaskMixture
from tasks.mixtures import MIXTURES, mid_mixture


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """Train a base model on the token stream of conversations."""

    base_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    mixture: Annotated[str, Choices(MIXTURES)] = "full"  # full: Hub data sets; local: no download
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    num_iterations: CountOrMinusOne = -1  # optimizer steps; -1 is one pass over the mixture
    total_batch_size: Count = 524_288  # tokens of one optimizer step over all devices
    target_examples_per_step: CountOrMinusOne = -1  # rows of one step, instead of its tokens
    init_lr_frac: NonNegative = 1.0  # share of the rates to start from
    warmdown_ratio: Share = 0.2  # share of the run in which the rates fall to 0
    eval_every: CountOrMinusOne = 150  # steps between validations; -1 validates only at the end
    eval_tokens: Count = 20 * 524_288  # validation tokens
    compile: bool = False  # torch.compile the model


def main() -> None:
    # Settings: what this run is, where it runs, and which kernels it uses.
    settings = configurator.load(Settings)
    runtime, kernels = launch(settings)

    # Build: tokenizer, base model, conversations, optimizers, records.
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    token_bytes = get_token_bytes(runtime.device, settings.tokenizer_dir or None)
    model, base_meta, base_path = run.load_pretrained(
        settings.base_checkpoint, "base", runtime, tokenizer
    )
    train_data = mid_mixture(settings.mixture, "train", settings.task_data)
    val_data = mid_mixture(settings.mixture, "test", settings.task_data)
    sequence_len = model.config.sequence_len
    tokens_per_step = settings.total_batch_size
    if settings.target_examples_per_step != -1:
        tokens_per_step = settings.target_examples_per_step * sequence_len
    accumulation = scaling.accumulation_steps(
        tokens_per_step, settings.device_batch_size, sequence_len, runtime.world_size
    )
    num_iterations = settings.num_iterations
    if num_iterations == -1:
        num_iterations = max(1, estimate_tokens(tokenizer, train_data) // tokens_per_step)
    session = Session(
        "mid",
        settings.model_tag or base_meta["tag"],
        model,
        tokenizer,
        settings,
        runtime,
        kernels,
        tokens_per_step=tokens_per_step,
        num_iterations=num_iterations,
        record={"parent": str(base_path)},
        init_lr_frac=settings.init_lr_frac,
    )
    state = session.state
    trained = compiled(model, settings.compile)
    session.log_plan(
        num_iterations=num_iterations,
        num_conversations=len(train_data),
        total_batch_size=tokens_per_step,
        world_size=runtime.world_size,
    )
    micro_batch = settings.device_batch_size * sequence_len * runtime.world_size
    eval_batches = max(1, settings.eval_tokens // micro_batch)

    def open_loader(
        data: TaskMixture, loader_state: dict[str, Any] | None = None
    ) -> CUDAPrefetcher:
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

    # Loop: saving and evaluating happen between two steps; the last pass trains no more.
    batches = open_loader(train_data, state.loader_state)
    freeze_garbage()
    while not session.stopped:
        step, last = session.step, session.is_last
        # a checkpoint comes first: an evaluation may take long, and a kill must not cost the steps
        if last or due(step, settings.save_every):
            session.save()
        if last or step == 0 or due(step, settings.eval_every):
            with session.evaluation("validation"):
                pairs = first_batches(open_loader(val_data), eval_batches)
                bpb = evaluate_bpb(trained, pairs, token_bytes, runtime)
                state.min_bpb = min(state.min_bpb, bpb)
                session.log("eval", f"validation bpb {bpb:.4f}", split="val", bpb=bpb)
        if last or session.stopped:
            break

        # one optimizer step; the rates hold, then fall to 0: the base run has warmed up already
        with session.training():
            begun = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            scale = schedule.lr_scale(step, num_iterations, 0.0, settings.warmdown_ratio, 0.0)
            session.set_rates(scale)
            pairs = [(batch.inputs, batch.targets) for batch in micro_batches]
            result = train_step(trained, state.optimizers, pairs, runtime, settings.grad_clip)
            state.loader_state = micro_batches[-1].state  # not before: a signal may undo the step
            session.log_step(result, begun, scale)

    batches.close()
    session.finish(min_bpb=state.min_bpb)


if __name__ == "__main__":
    command.run(main)
