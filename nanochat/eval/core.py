"""CORE: 22 in-context learning tasks, scored by the losses of given continuations.

    multiple_choice    the choice with the smallest mean loss after the same context
    schema             the context after which the same continuation has the smallest mean loss
    language_modeling  every token of the continuation must be the most likely one

    centered = (accuracy - guessing) / (1 - guessing);   CORE = mean over the tasks, can be negative

The rows of a multiple-choice example differ only at their ends: the tokens they share, few-shot
examples above all, pass the model once, and every row uses their keys and values.
`score_examples` has a worked example.
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
    """Token rows of one example, and where each row's scored continuation begins and ends.

    gold  index of the right row; 0 if there is only one
    """

    rows: list[list[int]]
    starts: list[int]
    ends: list[int]
    gold: int

    @property
    def num_shared(self) -> int:
        """How many leading tokens all rows share, leaving one before each continuation."""
        return min(_common_prefix(self.rows), min(self.starts) - 1)


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows have in common."""
    for position, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(len(row) for row in rows)


def prompts(
    kind: str, item: dict[str, Any], shots: list[dict[str, Any]], delimiter: str
) -> list[str]:
    """The texts of an example's rows, each after the few-shot examples.

    For language modeling they are the context without and with the continuation.
    """
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
        # the first is stripped: a space at its end is part of the continuation's first token
        return [text.strip(), text + item["continuation"]]
    raise ValueError(f"task type {kind!r} is unknown; known: {KINDS}")


def make_example(
    tokenizer: Tokenizer, task: CoreTask, data: list[dict[str, Any]], index: int, max_tokens: int
) -> Example:
    """Example `index` of the shuffled data as tokens; rows keep their last max_tokens.

    Few-shot examples are drawn from the other items with a seed that depends on the index; if the
    data has fewer than the task asks for, all are used.
    """
    item = data[index]
    others = [i for i in range(len(data)) if i != index]
    draw = random.Random(FEWSHOT_SEED + index)
    shots = [data[i] for i in draw.sample(others, min(task.num_fewshot, len(others)))]
    bos = tokenizer.get_bos_token_id()
    texts = prompts(task.kind, item, shots, task.delimiter)
    rows = [tokenizer.encode(text, prepend=bos) for text in texts]
    ends = [len(row) for row in rows]
    # Where the continuation begins is found by comparing tokens, not by tokenizing it alone: its
    # first token may include the space before it.
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
    # too long: drop the beginning, which is few-shot examples
    crops = [max(0, len(row) - max_tokens) for row in rows]
    return Example(
        [row[crop:] for row, crop in zip(rows, crops, strict=True)],
        [start - crop for start, crop in zip(starts, crops, strict=True)],
        [end - crop for end, crop in zip(ends, crops, strict=True)],
        item.get("gold", 0),
    )


@dataclass(frozen=True)
class _Suffix:
    """What is left of a row after the tokens that it shares with its example's other rows.

    example  index of the example in the batch
    tokens   from the first token that is not shared up to the end of the continuation
    start    where the continuation begins in `tokens`, at least 1: the logits that predict a token
             are those of the position before it
    """

    example: int
    tokens: list[int]
    start: int


@torch.inference_mode()
def score_examples(model: GPT, examples: Sequence[Example], by_loss: bool) -> list[bool]:
    """Whether the model answers each example correctly; `examples` is one of `batches`.

    by_loss  the gold row must have the smallest mean loss; otherwise every token of the
             continuation must be the most likely one.

    A question with two choices, each tokenized with its prompt, continuations in brackets:

        row 0    bos  7  8  9 [ 4  5 ]        rows share bos 7 8 9, but one shared token stays in
        row 1    bos  7  8  9 [ 6 ]           the suffix, to predict the continuation's first

        prefix   bos  7  8                    once through the model; its keys and values are
                                              copied into both rows of the cache
        suffixes 9  4  5                      one forward pass for all suffixes of the batch,
                 9  6  0                      padded on the right; start = 1
        logits   of 9 predict 4, of 4 predict 5; of 9 predict 6
        losses   mean over 2 tokens for row 0, over 1 for row 1; the smaller one is the answer
    """
    # 1. Split every row into the prefix that its example shares and its own suffix.
    shared = [example.num_shared for example in examples]
    suffixes = [
        _Suffix(index, row[num_shared:end], start - num_shared)
        for index, (example, num_shared) in enumerate(zip(examples, shared, strict=True))
        for row, start, end in zip(example.rows, example.starts, example.ends, strict=True)
    ]
    # 2. Prefixes pass the model once per example, suffixes once per row on top of them.
    prefixes = [example.rows[0][:n] for example, n in zip(examples, shared, strict=True)]
    owners = [suffix.example for suffix in suffixes]
    longest = max(len(suffix.tokens) for suffix in suffixes)
    cache = _prefix_cache(model, prefixes, owners, longest)
    tokens = _padded([suffix.tokens for suffix in suffixes], model.device)
    hidden = model.hidden(tokens, cache)
    # 3. Reduce to one number per row: mean loss, or share of wrong tokens.
    row_means = _continuation_means(model, suffixes, tokens, hidden, by_loss)
    # 4. Compare the rows of each example.
    per_example = row_means.split([len(example.rows) for example in examples])
    if not by_loss:
        return [bool(wrong[0] == 0) for wrong in per_example]
    return [
        int(losses.argmin()) == example.gold
        for losses, example in zip(per_example, examples, strict=True)
    ]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(rows, longest) int64, padded with 0 on the right, which causal attention never looks at."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _prefix_cache(
    model: GPT, prefixes: list[list[int]], owners: list[int], num_suffix_tokens: int
) -> KVCache:
    """A cache with one row per suffix, holding its example's prefix, with space for the suffix."""
    config, device, dtype = model.config, model.device, model.dtype
    longest = max(len(prefix) for prefix in prefixes)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    prefilled = KVCache(config, len(prefixes), max(longest, 1), device, dtype)
    if longest:
        model.hidden(_padded(prefixes, device), prefilled)
    owner = torch.tensor(owners, device=device)
    cache = KVCache(config, len(owners), longest + num_suffix_tokens, device, dtype)
    cache.keys[:, :, :longest] = prefilled.keys[:, owner, :longest]
    cache.values[:, :, :longest] = prefilled.values[:, owner, :longest]
    # A row continues at its own length: what padding wrote after a shorter prefix is overwritten.
    cache.lengths = lengths[owner].clone()
    return cache


def _continuation_means(
    model: GPT, suffixes: Sequence[_Suffix], tokens: Tensor, hidden: Tensor, by_loss: bool
) -> Tensor:
    """Mean over each row's continuation, (rows,): of the loss, or of 1 where a token is not the
    most likely one.

    The head runs on the continuations' positions only, all rows in one flat list: logits of whole
    rows would be vocabulary size times as large as the tokens.
    """
    places = [
        (row, position)
        for row, suffix in enumerate(suffixes)
        for position in range(suffix.start, len(suffix.tokens))
    ]
    rows, positions = torch.tensor(places, device=tokens.device).unbind(dim=1)
    targets = tokens[rows, positions]
    logits = model.head(hidden[rows, positions - 1])
    if by_loss:
        values = F.cross_entropy(logits, targets, reduction="none")
    else:
        values = (logits.argmax(dim=-1) != targets).float()
    sums = torch.zeros(len(suffixes), device=tokens.device).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=len(suffixes))


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: CoreTask,
    runtime: Runtime,
    batch_tokens: int = 32_768,
    max_per_task: int = -1,
) -> float:
    """Accuracy of the model on a task, over all ranks.

    batch_tokens  positions, including padding, that pass the model together.
    Raises        as Runtime.sum_over_ranks does.
    """
    data = task.load()
    random.Random(SHUFFLE_SEED).shuffle(data)
    if max_per_task > 0:
        data = data[:max_per_task]
    indices = range(runtime.rank, len(data), runtime.world_size)
    limit = model.config.sequence_len
    examples = [make_example(tokenizer, task, data, index, limit) for index in indices]
    by_loss = task.kind != "language_modeling"

    def of_this_rank() -> Tensor:
        right = 0
        for batch in batches(examples, batch_tokens, limit):
            runtime.check_stop()
            right += sum(score_examples(model, batch, by_loss))
        return torch.tensor([right, len(examples)], dtype=torch.float64)

    total_right, total = runtime.sum_over_ranks(2, of_this_rank)
    return total_right / total


def batches(
    examples: Sequence[Example], batch_tokens: int, sequence_len: int
) -> Iterator[list[Example]]:
    """Groups of examples of similar length: at most batch_tokens positions, at least one example.

    A row of a batch occupies the longest prefix plus the longest suffix of the batch, since both
    are padded: that width must fit sequence_len, even if no single example is that long.
    """
    batch: list[Example] = []
    rows = prefix = suffix = 0
    for example in sorted(examples, key=lambda e: (e.num_shared, max(e.ends))):
        new_rows = rows + len(example.rows)
        new_prefix = max(prefix, example.num_shared)
        new_suffix = max(suffix, max(example.ends) - example.num_shared)
        width = new_prefix + new_suffix
        if batch and (new_rows * width > batch_tokens or width > sequence_len):
            yield batch
            batch, new_rows = [], len(example.rows)
            new_prefix = example.num_shared
            new_suffix = max(example.ends) - example.num_shared
        batch.append(example)
        rows, prefix, suffix = new_rows, new_prefix, new_suffix
    if batch:
        yield batch


def centred(accuracy: float, guessing_percent: float) -> float:
    """0 for guessing, 1 for all right."""
    guessing = 0.01 * guessing_percent
    return (accuracy - guessing) / (1 - guessing)
