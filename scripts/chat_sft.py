"""Supervised fine-tuning: only what the assistant says is learned, one conversation a row.

python -m scripts.chat_sft --mid_checkpoint=mid_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

import time
from dataclasses import dataclass
from typing import Annotated, Any

from nanochat import command, configurator, scaling, stages
from nanochat.common import freeze_garbage
from nanochat.data.conversation_loader import ConversationLoader
from nanochat.data.dataloader import CUDAPrefetcher
from nanochat.eval.loss import evaluate_loss
from nanochat.eval.tasks import evaluate_categorical
from nanochat.gpt import GPT
from nanochat.optim import schedule
from nanochat.settings import (
    Choices,
    Count,
    CountOrAuto,
    CountOrMinusOne,
    CountOrZero,
    NonNegative,
)
from nanochat.text.tokenizer import get_tokenizer
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.train import auto_batch, run
from nanochat.train.run import due
from nanochat.train.session import Session, TrainingSettings, compiled, first_batches, launch
from nanochat.train.step import train_step
from tasks.common import Task, TaskMixture
from tasks.mixtures import MIXTURES, sft_mixture
from tasks.registry import get_evaluated_tasks, sft_test_names

PACKINGS = ("padded", "packed")  # of the loader's: those that learn the assistant's side only


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """Fine-tune a mid-trained model on the assistant's side of conversations."""

    mid_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: Annotated[str, Choices(stages.parents_of("chatsft"))] = "mid"  # its stage
    mixture: Annotated[str, Choices(MIXTURES)] = "full"  # full: Hub data sets; local: no download
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    num_iterations: CountOrMinusOne = -1  # optimizer steps; -1 derives them from the next one
    num_epochs: Count = 1  # passes over the mixture
    device_batch_size: CountOrAuto = 4  # rows a device holds at once; auto: those that fit
    target_examples_per_step: Count = 32  # rows of one optimizer step over all devices
    packing: Annotated[str, Choices(PACKINGS)] = "padded"  # a conversation a row, or those that fit
    init_lr_frac: NonNegative = 0.02  # share of the rates to start from
    eval_every: CountOrMinusOne = 100  # steps between validations; -1 validates only at the end
    eval_steps: Count = 100  # batches of a validation
    eval_metrics_every: CountOrMinusOne = 200  # steps between tests; -1 tests only at the end
    eval_metrics_max_problems: CountOrZero = 1024  # problems of each test; 0 tests nothing
    compile: bool = False  # torch.compile the model


def main() -> None:
    # Settings: what this run is, where it runs, and which kernels it uses.
    settings = configurator.load(Settings)
    runtime, kernels = launch(settings)

    # Build: tokenizer, the parent's model, conversations, optimizers, records.
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, parent_meta, parent_path = run.load_pretrained(
        settings.mid_checkpoint, settings.source, runtime, tokenizer
    )
    train_data = sft_mixture(settings.mixture, "train", settings.task_data)
    val_data = sft_mixture(settings.mixture, "test", settings.task_data)
    tests: dict[str, Task] = {}
    if settings.mixture == "full" and settings.eval_metrics_max_problems > 0:
        tests = get_evaluated_tasks(sft_test_names(), settings.task_data)
    sequence_len = model.config.sequence_len
    scaling.accumulation_steps(
        settings.target_examples_per_step, max(1, settings.device_batch_size), 1, runtime.world_size
    )
    num_iterations = settings.num_iterations
    if num_iterations == -1:
        rows = settings.num_epochs * len(train_data)
        num_iterations = max(1, rows // settings.target_examples_per_step)
    session = Session(
        "chatsft",
        settings.model_tag or parent_meta["tag"],
        model,
        tokenizer,
        settings,
        runtime,
        kernels,
        tokens_per_step=settings.target_examples_per_step * sequence_len,
        num_iterations=num_iterations,
        record={"parent": str(parent_path)},
        init_lr_frac=settings.init_lr_frac,
    )
    state = session.state
    trained = compiled(model, settings.compile)
    settings, accumulation = auto_batch.resolved(
        settings, settings.target_examples_per_step * sequence_len, model, trained, runtime, kernels
    )
    session.log_plan(
        num_iterations=num_iterations,
        num_conversations=len(train_data),
        examples_per_step=settings.target_examples_per_step,
        world_size=runtime.world_size,
    )

    def open_loader(
        data: TaskMixture, loader_state: dict[str, Any] | None = None
    ) -> CUDAPrefetcher:
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
                pairs = first_batches(open_loader(val_data), settings.eval_steps)
                val_loss = evaluate_loss(trained, pairs, runtime)
                session.log("eval", f"validation loss {val_loss:.4f}", split="val", loss=val_loss)
        if last or due(step, settings.eval_metrics_every):
            with session.evaluation("tests"):
                run_tests(tests, model, tokenizer, session, settings)
        if last or session.stopped:
            break

        # one optimizer step; the rates fall to 0 from the first on, so that the little data there
        # is moves the model less and less
        with session.training():
            begun = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            scale = schedule.lr_scale(step, num_iterations, 0.0, 1.0, 0.0)
            session.set_rates(scale)
            pairs = [(batch.inputs, batch.targets) for batch in micro_batches]
            result = train_step(trained, state.optimizers, pairs, runtime, settings.grad_clip)
            state.loader_state = micro_batches[-1].state  # not before: a signal may undo the step
            session.log_step(result, begun, scale)

    batches.close()
    session.finish()


def run_tests(
    tests: dict[str, Task], model: GPT, tokenizer: Tokenizer, session: Session, settings: Settings
) -> None:
    """Accuracy on multiple-choice tasks."""
    for name, task in tests.items():
        result = evaluate_categorical(
            model,
            tokenizer,
            task,
            session.runtime,
            batch_size=2 * settings.device_batch_size,  # twice: no gradients are kept
            max_problems=settings.eval_metrics_max_problems,
        )
        text = f"{name} {result.accuracy:.4f}"
        session.log("task", text, task=name, accuracy=result.accuracy)


if __name__ == "__main__":
    command.run(main)
