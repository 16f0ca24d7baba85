"""Reinforcement learning on problems with checkable answers: sample, reward, reinforce.

python -m scripts.chat_rl --sft_checkpoint=chatsft_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --num_samples=16 --reward_weight=1.0
"""

import copy
import time
from dataclasses import dataclass
from statistics import mean

import torch

from nanochat import configurator
from nanochat.common import StopRequest, freeze_garbage, print0, setup_training
from nanochat.eval.tasks import pass_at_k
from nanochat.infer.engine import Engine
from nanochat.kernels.registry import format_choices, select
from nanochat.optim import schedule
from nanochat.profiler.throughput import Meter, console_line, peak_memory_gib
from nanochat.text.chat_format import render_for_completion
from nanochat.text.tokenizer import get_tokenizer
from nanochat.train import run
from nanochat.train.policy_gradient import (
    PolicyBatch,
    PolicyLoss,
    advantages,
    log_probabilities,
    pad_samples,
)
from nanochat.train.run import due
from nanochat.train.step import set_rates, train_step
from tasks.registry import get_rewarded_task


@dataclass(frozen=True)
class Settings:
    """REINFORCE on a task's rewards; GRPO's deviation, PPO's clip and a KL term are switches."""

    sft_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: str = "chatsft"  # stage of the checkpoint: chatsft, mid or base
    task: str = "GSM8K"  # what to learn: GSM8K, SpellingBee or another generative task
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    run: str = "dummy"  # name of the wandb run; "dummy" does not use wandb
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu
    num_iterations: int = -1  # optimizer steps; -1 derives them from the next one
    num_epochs: int = 1  # passes over the task's training problems
    examples_per_step: int = 16  # problems of one optimizer step over all devices
    num_samples: int = 16  # answers sampled to each problem
    device_batch_size: int = 8  # answers a device samples or trains on at once
    max_new_tokens: int = 256  # longest answer
    temperature: float = 1.0  # of the samples
    top_k: int = 50  # sample among the likeliest; 0 is all
    reward_weight: float = 1.0  # factor of every reward
    normalize_std: bool = False  # divide advantages by their deviation, as GRPO does
    clip: float = 0.0  # PPO's clip of p / p_old; matters with updates_per_batch > 1
    kl: float = 0.0  # weight of the divergence from the model this run begins with
    updates_per_batch: int = 1  # optimizer steps on the same samples
    embedding_lr: float = 0.2  # AdamW rate of the embedding at width 768
    unembedding_lr: float = 0.004  # AdamW rate of the head at width 768
    matrix_lr: float = 0.02  # Muon rate of the matrices
    newton_schulz: str = "muon"  # coefficients of Muon's Newton-Schulz: muon or polar_express
    init_lr_frac: float = 0.05  # share of these rates to start from
    weight_decay: float = 0.0  # decoupled decay of embedding and head
    grad_clip: float = 0.0  # largest global gradient norm; 0 does not clip
    eval_every: int = 60  # steps between evaluations; -1 evaluates only at the end
    eval_examples: int = 400  # test problems of an evaluation
    eval_samples: int = 8  # answers to each: pass@1 to pass@<this>
    save_every: int = 60  # steps between checkpoints; -1 saves only at the end
    keep_last: int = 2  # newest checkpoints kept; 0 keeps all
    model_tag: str = ""  # folder of the checkpoints; empty is the source model's
    resume: bool = False  # go on from the newest checkpoint of the tag, if there is one
    resume_from: str = ""  # go on from this checkpoint: file, folder, tag or step
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    seed: int = 42  # of the samples


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device, settings.seed)
    stop = StopRequest()
    kernels = select(settings.kernels, runtime.device, runtime.dtype)
    print0(format_choices(kernels))

    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, parent_meta, parent_path = run.load_pretrained(
        settings.sft_checkpoint, settings.source, runtime, tokenizer
    )
    reference = copy.deepcopy(model).requires_grad_(False) if settings.kl else None
    train_task = get_rewarded_task(settings.task, "train", settings.task_data)
    test_task = get_rewarded_task(settings.task, "test", settings.task_data)
    examples_per_rank = share_of_step(settings.examples_per_step, runtime.world_size)
    num_iterations = settings.num_iterations
    if num_iterations == -1:
        problems = settings.num_epochs * len(train_task)
        num_iterations = max(1, problems // settings.examples_per_step)
    policy_loss = PolicyLoss(settings.clip, settings.kl)
    meter = Meter(
        1,  # tokens of a step differ; the rate of the record counts sampled ones
        model.estimate_flops(causal=True),
        model.estimate_flops(causal=False),
        run.device_peaks(runtime),
        runtime.world_size,
        num_iterations,
    )
    state, tracker = run.open_run(
        "chatrl",
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
    filler = tokenizer.encode_special("<|assistant_end|>")

    engine = Engine(model, tokenizer, num_slots=settings.device_batch_size)

    def sample(prompt: list[int], count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and answer of every sample, and 1 where the model chose the token."""
        return engine.generate_batch(
            prompt,
            count,
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            seed,
        )

    def rollout(problem: int) -> tuple[list[PolicyBatch], list[float], list[int]]:
        """Training batches of one problem, its rewards and its answers' lengths."""
        conversation = train_task[problem % len(train_task)]
        prompt = render_for_completion(tokenizer, conversation)
        sequences, masks = sample(prompt, settings.num_samples, settings.seed + problem)
        texts = [tokenizer.decode(ids[len(prompt) :]) for ids in sequences]
        paid = [settings.reward_weight * train_task.reward(conversation, text) for text in texts]
        worth = advantages(torch.tensor(paid), settings.normalize_std)
        batches = []
        for start in range(0, len(sequences), settings.device_batch_size):
            part = slice(start, start + settings.device_batch_size)
            padded = pad_samples(sequences[part], masks[part], filler)
            inputs, targets = (x.to(runtime.device) for x in padded)
            batch = PolicyBatch(inputs, targets, worth[part].to(runtime.device))
            with torch.no_grad():
                if settings.clip:
                    batch = batch._replace(old_logp=log_probabilities(model, inputs, targets))
                if reference is not None:
                    logp = log_probabilities(reference, inputs, targets)
                    batch = batch._replace(reference_logp=logp)
            batches.append(batch)
        return batches, paid, [sum(mask) for mask in masks]

    def evaluate() -> dict[str, float]:
        """pass@k of the test problems, k = 1, 2, 4, ... up to eval_samples."""
        count = min(settings.eval_examples, len(test_task))
        ks = [k for k in range(1, settings.eval_samples + 1) if k & (k - 1) == 0]
        sums = torch.zeros(len(ks) + 1, dtype=torch.float64, device=runtime.device)
        for index in range(runtime.rank, count, runtime.world_size):
            conversation = test_task[index]
            prompt = render_for_completion(tokenizer, conversation)
            sequences, _ = sample(prompt, settings.eval_samples, settings.seed + index)
            right = sum(
                bool(test_task.evaluate(conversation, tokenizer.decode(ids[len(prompt) :])))
                for ids in sequences
            )
            values = [pass_at_k(settings.eval_samples, right, k) for k in ks]
            sums += torch.tensor([*values, 1.0], dtype=torch.float64, device=runtime.device)
        runtime.all_reduce(sums)
        total = max(1.0, sums[-1].item())
        return {f"pass@{k}": sums[i].item() / total for i, k in enumerate(ks)}

    started = time.perf_counter()
    freeze_garbage()
    while True:
        step = state.step
        last = step >= num_iterations
        if last or due(step, settings.save_every):
            state.save(runtime, settings.keep_last)
        if last or step == 0 or due(step, settings.eval_every):
            scores = evaluate()
            tracker.log("eval", step, split="test", **scores)
            line = " | ".join(f"{name} {score:.4f}" for name, score in scores.items())
            print0(f"step {step:05d} | {settings.task} {line}")
        if last or stop.agreed(runtime):
            break

        before = time.perf_counter()
        first = step * settings.examples_per_step + runtime.rank * examples_per_rank
        rollouts = [rollout(problem) for problem in range(first, first + examples_per_rank)]
        batches = [batch for part, _, _ in rollouts for batch in part]
        scale = schedule.lr_scale(step, num_iterations, 0.0, 1.0, 0.0)
        set_rates(state.optimizers, scale, schedule.muon_momentum(step))
        result = [
            train_step(model, state.optimizers, batches, runtime, settings.grad_clip, policy_loss)
            for _ in range(settings.updates_per_batch)
        ][-1]
        engine.update_weights()
        loss, grad_norm = result.loss.item(), result.grad_norm.item()
        paid = [reward for _, rewards, _ in rollouts for reward in rewards]
        lengths = [length for _, _, counts in rollouts for length in counts]
        means = torch.tensor([mean(paid), mean(lengths)], device=runtime.device)
        reward, length = (runtime.all_reduce(means) / runtime.world_size).tolist()
        meter.tokens_per_step = round(length * settings.num_samples * settings.examples_per_step)
        values = meter.update(step, loss, time.perf_counter() - before)
        values |= {"grad_norm": grad_norm, "lr_scale": scale, "reward": reward, "length": length}
        values |= {"memory_gib": peak_memory_gib(runtime)}
        tracker.log("train", step, **values)
        line = console_line(step, num_iterations, values)
        print0(f"{line} | reward {reward:.4f} | length {length:.1f}")
        state.check_finite(loss, grad_norm, runtime)
        state.step += 1

    early = None if last else stop
    state.finish(tracker, runtime, early, settings.keep_last, started)


def share_of_step(examples_per_step: int, world_size: int) -> int:
    """Problems of a step for each rank. Raises ValueError if they cannot be shared evenly."""
    if examples_per_step < 1 or examples_per_step % world_size:
        raise ValueError(
            f"--examples_per_step={examples_per_step} must be a positive multiple of the "
            f"{world_size} ranks"
        )
    return examples_per_step // world_size


if __name__ == "__main__":
    main()
