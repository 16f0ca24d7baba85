"""Reinforcement learning on problems with checkable answers: sample, reward, reinforce.

python -m scripts.chat_rl --sft_checkpoint=chatsft_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --num_samples=16 --reward_weight=1.0
"""

import copy
import time
from dataclasses import dataclass, replace
from typing import Annotated

import torch

from nanochat import command, configurator, stages
from nanochat.common import Runtime, freeze_garbage
from nanochat.eval.tasks import pass_at_k
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.optim import schedule
from nanochat.settings import Choices, Count, CountOrMinusOne, CountOrZero, Finite, NonNegative
from nanochat.text.chat_format import render_for_completion
from nanochat.text.tokenizer import get_tokenizer
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.train import run
from nanochat.train.policy_gradient import (
    PolicyBatch,
    PolicyLoss,
    advantages,
    log_probabilities,
    pad_samples,
)
from nanochat.train.run import due
from nanochat.train.session import Session, TrainingSettings, launch
from nanochat.train.step import train_step
from tasks.common import Task
from tasks.file_rows import FILE_OF_PROBLEMS, names_rows
from tasks.registry import get_rewarded_task, record_name, rewarded_names

Names = Choices(rewarded_names, also=names_rows, also_word=FILE_OF_PROBLEMS)


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """REINFORCE on a task's rewards; GRPO's deviation, PPO's clip and a KL term are switches."""

    sft_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: Annotated[str, Choices(stages.parents_of("chatrl"))] = "chatsft"  # its stage
    task: Annotated[str, Names] = "GSM8K"  # what to learn
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    allow_weaker_sandbox: bool = False  # run answers that are programs without every barrier
    num_iterations: CountOrMinusOne = -1  # optimizer steps; -1 derives them from the next one
    num_epochs: Count = 1  # passes over the task's training problems
    examples_per_step: Count = 16  # problems of one optimizer step over all devices
    num_samples: Count = 16  # answers sampled to each problem
    device_batch_size: Count = 8  # answers a device samples or trains on at once
    max_new_tokens: Count = 256  # longest answer
    temperature: NonNegative = 1.0  # of the samples
    top_k: CountOrZero = 50  # sample among the likeliest; 0 is all
    reward_weight: Finite = 1.0  # factor of every reward
    normalize_std: bool = False  # divide advantages by their deviation, as GRPO does
    clip: NonNegative = 0.0  # PPO's clip of p / p_old; matters with updates_per_batch > 1
    kl: NonNegative = 0.0  # weight of the divergence from the model this run begins with
    updates_per_batch: Count = 1  # optimizer steps on the same samples
    init_lr_frac: NonNegative = 0.05  # share of the rates to start from
    eval_every: CountOrMinusOne = 60  # steps between evaluations; -1 evaluates only at the end
    eval_examples: Count = 400  # test problems of an evaluation
    eval_samples: Count = 8  # answers to each: pass@1 to pass@<this>
    save_every: CountOrMinusOne = 60  # steps between checkpoints; -1 saves only at the end


def main() -> None:
    # Settings: what this run is, where it runs, and which kernels it uses.
    settings = configurator.load(Settings)
    runtime, kernels = launch(settings)
    examples_per_rank = share_of_step(settings.examples_per_step, runtime.world_size)

    # Build: tokenizer, the parent's model, problems, optimizers, records, the sampler.
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, parent_meta, parent_path = run.load_pretrained(
        settings.sft_checkpoint, settings.source, runtime, tokenizer
    )
    # copied before a resumed run replaces the weights: the divergence is from the parent
    reference = copy.deepcopy(model).requires_grad_(False) if settings.kl else None
    train_task, test_task = (
        get_rewarded_task(settings.task, split, settings.task_data, settings.allow_weaker_sandbox)
        for split in ("train", "test")
    )
    train_task.ready()
    num_iterations = settings.num_iterations
    if num_iterations == -1:
        problems = settings.num_epochs * len(train_task)
        num_iterations = max(1, problems // settings.examples_per_step)
    policy_loss = PolicyLoss(settings.clip, settings.kl)
    session = Session(
        "chatrl",
        settings.model_tag or parent_meta["tag"],
        model,
        tokenizer,
        settings,
        runtime,
        kernels,
        tokens_per_step=1,  # steps differ; each one's sampled tokens are counted below
        num_iterations=num_iterations,
        record={"parent": str(parent_path)},
        init_lr_frac=settings.init_lr_frac,
    )
    optimizers = session.state.optimizers
    sampler = Sampler(model, tokenizer, settings, runtime, reference)

    # Loop: saving and evaluating happen between two steps; the last pass trains no more.
    freeze_garbage()
    while not session.stopped:
        step, last = session.step, session.is_last
        # a checkpoint comes first: an evaluation may take long, and a kill must not cost the steps
        if last or due(step, settings.save_every):
            session.save()
        if last or step == 0 or due(step, settings.eval_every):
            with session.evaluation("evaluation"):
                scores = sampler.evaluate(test_task)
                text = " | ".join(f"{name} {score:.4f}" for name, score in scores.items())
                session.log("eval", f"{record_name(settings.task)} {text}", split="test", **scores)
        if last or session.stopped:
            break

        with session.training():
            # sample: every rank answers its own problems with the weights of this moment
            begun = time.perf_counter()
            first = step * settings.examples_per_step + runtime.rank * examples_per_rank
            batches, reward, length = sampler.rollouts(train_task, first, examples_per_rank)
            # reinforce: one step, or several on the same answers, which is what the clip is for;
            # once the first update is made, no signal keeps the step from being finished
            scale = schedule.lr_scale(step, num_iterations, 0.0, 1.0, 0.0)
            session.set_rates(scale)
            clip, finishing = settings.grad_clip, replace(runtime, stop=None)
            result = train_step(model, optimizers, batches, runtime, clip, policy_loss)
            for _ in range(settings.updates_per_batch - 1):
                result = train_step(model, optimizers, batches, finishing, clip, policy_loss)
            sampler.engine.update_weights()
            sampled = round(length * settings.num_samples * settings.examples_per_step)
            session.meter.tokens_per_step = sampled
            note = f"reward {reward:.4f} | length {length:.1f}"
            session.log_step(result, begun, scale, note, reward=reward, length=length)

    session.finish()


@dataclass(frozen=True)
class Rollout:
    """The answers to one problem: training batches, the reward and the tokens of each answer."""

    batches: list[PolicyBatch]
    rewards: list[float]
    lengths: list[int]


class Sampler:
    """Answers of the model as it is, for training and for evaluation."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        settings: Settings,
        runtime: Runtime,
        reference: GPT | None,
    ) -> None:
        self.model = model
        self.reference = reference
        self.tokenizer = tokenizer
        self.settings = settings
        self.runtime = runtime
        self.engine = Engine(model, tokenizer, num_slots=settings.device_batch_size)
        self.filler = tokenizer.encode_special("<|assistant_end|>")

    def sample(
        self, prompt: list[int], count: int, seed: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and answer of every sample, and 1 where the model chose the token."""
        settings = self.settings
        return self.engine.generate_batch(
            prompt, count, settings.max_new_tokens, settings.temperature, settings.top_k, seed
        )

    def rollouts(
        self, task: Task, first: int, count: int
    ) -> tuple[list[PolicyBatch], float, float]:
        """Training batches of `count` problems from `first` on; mean reward and tokens of an answer
        over all ranks, each of which has equally many.

        Raises  as Runtime.sum_over_ranks does.
        """
        batches: list[PolicyBatch] = []

        def of_this_rank() -> torch.Tensor:
            sums = torch.zeros(2, dtype=torch.float64)
            for problem in range(first, first + count):
                self.runtime.check_stop()
                rollout = self.rollout(task, problem)
                batches.extend(rollout.batches)
                sums[0] += sum(rollout.rewards)
                sums[1] += sum(rollout.lengths)
            return sums

        reward, length = self.runtime.sum_over_ranks(2, of_this_rank)
        answers = count * self.settings.num_samples * self.runtime.world_size
        return batches, reward / answers, length / answers

    def rollout(self, task: Task, problem: int) -> Rollout:
        """Answer a problem of the task, which repeats after its last, and reward the answers."""
        settings, device = self.settings, self.runtime.device
        conversation = task[problem % len(task)]
        prompt = render_for_completion(self.tokenizer, conversation)
        sequences, masks = self.sample(prompt, settings.num_samples, settings.seed + problem)
        texts = [self.tokenizer.decode(ids[len(prompt) :]) for ids in sequences]
        rewards = [settings.reward_weight * task.reward(conversation, text) for text in texts]
        # (N,): how much better than the other answers to the same problem
        advantages_N = advantages(torch.tensor(rewards), settings.normalize_std)
        batches = []
        for start in range(0, len(sequences), settings.device_batch_size):
            part = slice(start, start + settings.device_batch_size)
            padded = pad_samples(sequences[part], masks[part], self.filler)
            inputs, targets = (x.to(device) for x in padded)
            batch = PolicyBatch(inputs, targets, advantages_N[part].to(device))
            with torch.no_grad():
                if settings.clip:
                    batch = batch._replace(old_logp=log_probabilities(self.model, inputs, targets))
                if self.reference is not None:
                    logp = log_probabilities(self.reference, inputs, targets)
                    batch = batch._replace(reference_logp=logp)
            batches.append(batch)
        return Rollout(batches, rewards, [sum(mask) for mask in masks])

    def evaluate(self, task: Task) -> dict[str, float]:
        """pass@k of the task's first problems, k = 1, 2, 4, ... up to eval_samples."""
        settings, runtime = self.settings, self.runtime
        count = min(settings.eval_examples, len(task))
        ks = [k for k in range(1, settings.eval_samples + 1) if k & (k - 1) == 0]

        # the sum of each pass@k, then the number of problems; ranks take every world_size-th one
        def of_this_rank() -> torch.Tensor:
            sums = torch.zeros(len(ks) + 1, dtype=torch.float64)
            for index in range(runtime.rank, count, runtime.world_size):
                runtime.check_stop()
                conversation = task[index]
                prompt = render_for_completion(self.tokenizer, conversation)
                sequences, _ = self.sample(prompt, settings.eval_samples, settings.seed + index)
                texts = [self.tokenizer.decode(ids[len(prompt) :]) for ids in sequences]
                num_right = sum(bool(task.evaluate(conversation, text)) for text in texts)
                values = [pass_at_k(settings.eval_samples, num_right, k) for k in ks]
                sums += torch.tensor([*values, 1.0], dtype=torch.float64)
            return sums

        *passed, total = runtime.sum_over_ranks(len(ks) + 1, of_this_rank)
        return {f"pass@{k}": value / max(1.0, total) for k, value in zip(ks, passed, strict=True)}


def share_of_step(examples_per_step: int, world_size: int) -> int:
    """Problems of a step for each rank. Raises ValueError if they cannot be shared evenly."""
    if examples_per_step < 1 or examples_per_step % world_size:
        raise ValueError(
            f"--examples_per_step={examples_per_step} must be a positive multiple of the "
            f"{world_size} ranks"
        )
    return examples_per_step // world_size


if __name__ == "__main__":
    command.run(main)
