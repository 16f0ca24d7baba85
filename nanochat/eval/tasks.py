"""Accuracy on tasks: multiple choice by one forward pass, free answers by generation; ChatCORE.

A task is anything with `__len__`, `__getitem__` -> conversation, `eval_type` and
`evaluate(conversation, answer)`, as in tasks/.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingSettings
from nanochat.text.chat_format import Conversation, render_for_completion
from nanochat.text.tokenizer_base import Tokenizer

# queued for each slot of the engine, so that a long answer does not leave the other slots idle
REQUESTS_PER_SLOT = 16


class Task(Protocol):
    """What evaluation asks of a task."""

    @property
    def eval_type(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def evaluate(self, conversation: Conversation, answer: Any) -> Any: ...


@dataclass(frozen=True)
class Accuracy:
    """Problems answered, right ones among them, and those too long for the context (wrong)."""

    num_problems: int
    num_right: int
    num_too_long: int

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_problems if self.num_problems else 0.0


def share(task: Task, runtime: Runtime, max_problems: int) -> range:
    """Indices of the problems of this rank; max_problems 0 or less is all."""
    count = min(len(task), max_problems) if max_problems > 0 else len(task)
    return range(runtime.rank, count, runtime.world_size)


def total(counts: Sequence[int], runtime: Runtime) -> list[int]:
    """Sums over all ranks."""
    summed = runtime.all_reduce(torch.tensor(counts, dtype=torch.int64, device=runtime.device))
    return [int(x) for x in summed.tolist()]


@torch.inference_mode()
def evaluate_categorical(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    runtime: Runtime,
    batch_size: int,
    max_problems: int = 0,
) -> Accuracy:
    """Share of problems whose right letter has the largest logit among the problem's letters.

    Problems are padded on the right and answered `batch_size` at a time, shared over the ranks.
    Raises  ValueError if a letter is not one token; otherwise as Runtime.sum_over_ranks does.
    """

    def of_this_rank() -> Tensor:
        right = too_long = answered = 0
        for batch in _batches(tokenizer, task, share(task, runtime, max_problems), batch_size):
            runtime.check_stop()
            answered += len(batch)
            fitting = [(c, ids) for c, ids in batch if len(ids) <= model.config.sequence_len]
            too_long += len(batch) - len(fitting)
            if not fitting:
                continue
            # padding is on the right, so it does not change the logits at a prompt's last token
            logits = _last_logits(model, [ids for _, ids in fitting])
            for (conversation, _), row in zip(fitting, logits, strict=True):
                letters = conversation["letters"]
                letter_ids = [_letter_token(tokenizer, letter) for letter in letters]
                best = int(row[letter_ids].argmax())
                right += bool(task.evaluate(conversation, letters[best]))
        return torch.tensor([answered, right, too_long], dtype=torch.float64)

    return Accuracy(*map(int, runtime.sum_over_ranks(3, of_this_rank)))


def evaluate_generative(
    engine: Engine,
    task: Task,
    runtime: Runtime,
    sampling: SamplingSettings,
    max_new_tokens: int,
    num_samples: int = 1,
    max_problems: int = 0,
) -> tuple[Accuracy, dict[str, float]]:
    """Share of problems with a right answer among num_samples, and pass@k of each power of two.

    sampling  of the first sample; the others differ in their random numbers alone. Problems are
              shared over the ranks.
    """
    ks = [k for k in range(1, num_samples + 1) if k & (k - 1) == 0]
    passed = torch.zeros(len(ks), dtype=torch.float64, device=runtime.device)
    right = too_long = 0
    indices = share(task, runtime, max_problems)
    at_once = max(1, REQUESTS_PER_SLOT * engine.num_slots // num_samples)
    # a bounded number of problems at a time: answers are kept until they are checked
    for start in range(0, len(indices), at_once):
        conversations = [task[i] for i in indices[start : start + at_once]]
        requests = []
        for conversation in conversations:
            prompt = render_for_completion(engine.tokenizer, conversation)
            if len(prompt) >= engine.capacity:
                too_long += 1
                continue
            room = min(max_new_tokens, engine.capacity - len(prompt))
            requests += [
                (conversation, Request(prompt, room, replace(sampling, sample=i)))
                for i in range(num_samples)
            ]
        handles = engine.complete([request for _, request in requests])
        # the samples of one problem are next to each other
        for first in range(0, len(handles), num_samples):
            conversation = requests[first][0]
            answers = [engine.tokenizer.decode(h.tokens) for h in handles[first:][:num_samples]]
            count = sum(bool(task.evaluate(conversation, answer)) for answer in answers)
            right += count > 0
            values = [pass_at_k(num_samples, count, k) for k in ks]
            passed += torch.tensor(values, dtype=torch.float64, device=runtime.device)
    accuracy = Accuracy(*total([len(indices), right, too_long], runtime))
    runtime.all_reduce(passed)
    problems = max(1, accuracy.num_problems)
    return accuracy, {f"pass@{k}": passed[i].item() / problems for i, k in enumerate(ks)}


def _batches(
    tokenizer: Tokenizer, task: Task, indices: range, batch_size: int
) -> Iterator[list[tuple[Conversation, list[int]]]]:
    """Conversations with their prompts, of similar length together."""
    prompts = [(task[i], render_for_completion(tokenizer, task[i])) for i in indices]
    prompts.sort(key=lambda pair: len(pair[1]))
    for start in range(0, len(prompts), batch_size):
        yield prompts[start : start + batch_size]


def _last_logits(model: GPT, prompts: Sequence[list[int]]) -> Tensor:
    """Logits (len(prompts), V) of the token after each prompt."""
    longest = max(len(ids) for ids in prompts)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=model.device)
    hidden = model.hidden(padded.to(model.device))
    return model.head(hidden[torch.arange(len(prompts), device=model.device), last])


def _letter_token(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"choice {letter!r} is {len(ids)} tokens; a choice must be a single one")
    return ids[0]


def chatcore(accuracies: Mapping[str, float], guessing: Mapping[str, float]) -> float | None:
    """Mean over the tasks of (accuracy - guessing) / (1 - guessing); None unless the
    tasks are exactly those of ChatCORE.

    guessing  accuracy of a model that knows nothing, for each task of ChatCORE.
    """
    if set(accuracies) != set(guessing):
        return None
    centered = [(accuracies[name] - base) / (1 - base) for name, base in guessing.items()]
    return math.fsum(centered) / len(centered)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one.

    The unbiased estimator of arXiv:2107.03374, section 2.1.
    Raises  ValueError unless 1 <= k <= num_samples and 0 <= num_right <= num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(
            f"pass@{k} of {num_right} right among {num_samples} samples: k must be 1 to "
            f"{num_samples}; sample more with --num_samples"
        )
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
