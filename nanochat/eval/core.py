"""CORE: 22 in-context learning tasks, scored by the losses of given continuations.

    multiple_choice    the choice with the least mean loss behind the same context
    schema             the context that gives the same continuation the least mean loss
    language_modeling  every token of the continuation must be the likeliest

    centred = (accuracy - guessing) / (1 - guessing);   CORE = mean over the tasks, perhaps below 0

The rows of an example share all tokens but their ends: the shared ones pass the model once, and
their keys and values serve every row.
Source  DataComp-LM, arXiv:2406.11794, section 3.5 and appendix G.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import Runtime
from nanochat.eval.core_bundle import CoreTask
from nanochat.gpt import GPT, KVCache
from nanochat.text.tokenizer_base import Tokenizer

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234  # plus the index of the example
KINDS = ("multiple_choice", "schema", "language_modeling")


@dataclass(frozen=True)
class Example:
    """Token rows of one example, and where each row's scored continuation begins and ends."""

    rows: list[list[int]]
    starts: list[int]
    ends: list[int]
    gold: int  # right row; 0 where there is only one

    @property
    def num_shared(self) -> int:
        """Leading tokens that all rows share, at least one before each continuation."""
        return min(_common_prefix(self.rows), min(self.starts) - 1)


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    for position, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(len(row) for row in rows)


def prompts(
    kind: str, item: dict[str, Any], shots: list[dict[str, Any]], delimiter: str
) -> list[str]:
    """The texts of an example behind its few-shot ones; of language modelling without and with
    the continuation."""
    if kind == "multiple_choice":
        head = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == "schema":
        head = "".join(
            f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots
        )
        options = item["context_options"]
        return [f"{head}{option}{delimiter}{item['continuation']}" for option in options]
    if kind == "language_modeling":
        head = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
        text = f"{head}{item['context'].strip()}{delimiter}"
        return [text.strip(), text + item["continuation"]]
    raise ValueError(f"task type {kind!r} is unknown; known: {KINDS}")


def make_example(
    tokenizer: Tokenizer, task: CoreTask, data: list[dict[str, Any]], index: int, max_tokens: int
) -> Example:
    """Example `index` of the shuffled data as tokens; rows keep their last max_tokens.

    Few-shot examples are drawn from the others by a seed of the index; fewer than asked for where
    the data has fewer.
    """
    item = data[index]
    others = [i for i in range(len(data)) if i != index]
    draw = random.Random(FEWSHOT_SEED + index)
    shots = [data[i] for i in draw.sample(others, min(task.num_fewshot, len(others)))]
    bos = tokenizer.get_bos_token_id()
    texts = prompts(task.kind, item, shots, task.delimiter)
    rows = [tokenizer.encode(text, prepend=bos) for text in texts]
    ends = [len(row) for row in rows]
    if task.kind == "multiple_choice":
        starts = [_common_prefix(rows)] * len(rows)
    elif task.kind == "schema":
        length = _common_prefix([row[::-1] for row in rows])
        starts = [end - length for end in ends]
    else:
        without, rows = rows[0], rows[1:]
        starts, ends = [len(without)], ends[1:]
        if rows[0][: len(without)] != without:
            raise ValueError(
                f"{task.label}: the tokens of example {index} change where its continuation "
                f"begins: {texts[1][-40:]!r}"
            )
    crops = [max(0, len(row) - max_tokens) for row in rows]
    return Example(
        [row[crop:] for row, crop in zip(rows, crops, strict=True)],
        [start - crop for start, crop in zip(starts, crops, strict=True)],
        [end - crop for end, crop in zip(ends, crops, strict=True)],
        item.get("gold", 0),
    )


@torch.inference_mode()
def is_right(model: GPT, examples: Sequence[Example], by_loss: bool) -> list[bool]:
    """Whether the model answers each example rightly; one of `batches`, scored together.

    by_loss  the gold row must have the least mean loss; otherwise every token must be likeliest.
    """
    device = model.device
    shared = [example.num_shared for example in examples]
    flat = [
        (e, row[p:end], start - p)
        for e, (example, p) in enumerate(zip(examples, shared, strict=True))
        for row, start, end in zip(example.rows, example.starts, example.ends, strict=True)
    ]
    longest = max(len(rest) for _, rest, _ in flat)
    owner = torch.tensor([e for e, _, _ in flat], device=device)
    lengths = torch.tensor(shared, device=device)
    cache = _shared_cache(model, [ex.rows[0][:p] for ex, p in zip(examples, shared, strict=True)],
                          lengths, owner, longest)  # fmt: skip
    rest = torch.tensor([rest + [0] * (longest - len(rest)) for _, rest, _ in flat], device=device)
    hidden = model.hidden(rest, cache)
    row_index = [i for i, (_, ids, start) in enumerate(flat) for _ in range(start, len(ids))]
    position = [j for _, ids, start in flat for j in range(start, len(ids))]
    rows, positions = (torch.tensor(x, device=device) for x in (row_index, position))
    targets = rest[rows, positions]
    logits = model.head(hidden[rows, positions - 1])
    counts = torch.bincount(rows, minlength=len(flat))
    values = F.cross_entropy(logits, targets, reduction="none")
    if not by_loss:
        values = (logits.argmax(dim=-1) != targets).float()
    means = torch.zeros(len(flat), device=device).index_add_(0, rows, values) / counts
    per_example = means.split([len(example.rows) for example in examples])
    if not by_loss:
        return [bool(mistakes[0] == 0) for mistakes in per_example]
    return [
        int(losses.argmin()) == example.gold
        for losses, example in zip(per_example, examples, strict=True)
    ]


def _shared_cache(
    model: GPT, prefixes: list[list[int]], lengths: Tensor, owner: Tensor, room: int
) -> KVCache:
    """A cache with the prefix of its example in each row, and room behind."""
    longest = max(len(prefix) for prefix in prefixes)
    config, device, dtype = model.config, model.device, model.dtype
    cache = KVCache(config, len(prefixes), max(longest, 1), device, dtype)
    if longest:
        padded = [prefix + [0] * (longest - len(prefix)) for prefix in prefixes]
        model.hidden(torch.tensor(padded, device=device), cache)
    rows = KVCache(config, len(owner), longest + room, device, dtype)
    rows.keys[:, :, :longest] = cache.keys[:, owner, :longest]
    rows.values[:, :, :longest] = cache.values[:, owner, :longest]
    rows.lengths = lengths[owner].clone()  # what padding wrote behind them is overwritten
    return rows


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: CoreTask,
    runtime: Runtime,
    batch_tokens: int = 32_768,
    max_per_task: int = -1,
) -> float:
    """Accuracy of the model on a task, over all ranks.

    batch_tokens  positions, padding included, that pass the model together.
    """
    data = task.load()
    random.Random(SHUFFLE_SEED).shuffle(data)
    if max_per_task > 0:
        data = data[:max_per_task]
    indices = range(runtime.rank, len(data), runtime.world_size)
    limit = model.config.sequence_len
    examples = [make_example(tokenizer, task, data, index, limit) for index in indices]
    by_loss = task.kind != "language_modeling"
    right = sum(
        sum(is_right(model, batch, by_loss)) for batch in batches(examples, batch_tokens, limit)
    )
    counts = torch.tensor([right, len(examples)], device=runtime.device)
    total_right, total = runtime.all_reduce(counts).tolist()
    return total_right / total


def batches(
    examples: Sequence[Example], batch_tokens: int, sequence_len: int
) -> Iterator[list[Example]]:
    """Examples of similar length together: at most batch_tokens positions, at least one example.

    The longest shared part and the longest rest of a batch fit sequence_len one behind the other:
    rows are padded to that.
    """
    batch: list[Example] = []
    rows = shared = rest = 0
    for example in sorted(examples, key=lambda e: (e.num_shared, max(e.ends))):
        new_rows = rows + len(example.rows)
        new_shared = max(shared, example.num_shared)
        new_rest = max(rest, max(example.ends) - example.num_shared)
        width = new_shared + new_rest
        if batch and (new_rows * width > batch_tokens or width > sequence_len):
            yield batch
            batch, new_rows = [], len(example.rows)
            new_shared = example.num_shared
            new_rest = max(example.ends) - example.num_shared
        batch.append(example)
        rows, shared, rest = new_rows, new_shared, new_rest
    if batch:
        yield batch


def centred(accuracy: float, guessing_percent: float) -> float:
    """0 for guessing, 1 for all right."""
    guessing = 0.01 * guessing_percent
    return (accuracy - guessing) / (1 - guessing)
