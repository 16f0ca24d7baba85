"""One measurement of bench/test_tokenizer.py, in its process: train or encode, and for how long.

    python -m bench.tokenizer_worker '[{"path": ..., "vocab_size": ...}, group, name]'

Prints the row as JSON. The names of groups and contenders are those of bench/test_tokenizer.py.
"""

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers

from nanochat.text.tokenizer import HuggingFaceTokenizer, byte_level_alphabet
from nanochat.text.tokenizer_base import SPECIAL_TOKENS, SPLIT_PATTERN
from rustbpe import Tokenizer

LOAD_ROUNDS = 9


def learn(texts: list[str], vocab_size: int, **options: Any) -> Tokenizer:
    """Of either rustbpe."""
    tokenizer = Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERN, **options)
    return tokenizer


def hugging_face(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """A Hugging Face tokenizer of the same merges: the two tokens below each one's rank."""
    alphabet = byte_level_alphabet()
    text = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((text[parts[0]], text[parts[1]]))
    model = models.BPE(vocab={text[token]: rank for token, rank in ranks.items()}, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    regex = tokenizers.Regex(SPLIT_PATTERN.replace("?+", "?").replace("++", "+"))
    split = pre_tokenizers.Split(regex, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def training(name: str, vocab_size: int) -> tuple[Callable[[list[str]], Any], Callable]:
    """What learns from texts, and the tokens of what it gives."""
    if name == "tokenizers":
        size = vocab_size + len(SPECIAL_TOKENS)
        alphabet = {char: byte for byte, char in byte_level_alphabet().items()}

        def tokens(trained: HuggingFaceTokenizer) -> list[bytes]:
            merges = json.loads(trained.tokenizer.to_str())["model"]["merges"]
            return [bytes(alphabet[char] for char in "".join(pair)) for pair in merges]

        return lambda texts: HuggingFaceTokenizer.train_from_iterator(texts, size), tokens
    options: dict[str, Any] = {"num_threads": 1} if "1 thread" in name else {}
    options |= {"num_threads": 4 * len(os.sched_getaffinity(0))} if "4 threads" in name else {}
    options |= {"tie_break": "huggingface"} if "ties" in name else {}
    return (
        lambda texts: learn(texts, vocab_size, **options),
        lambda trained: [token for token, _ in trained.get_mergeable_ranks()[256:]],
    )


def encoding(name: str, to_numpy: bool, trained: Tokenizer) -> Callable[[list[str]], Any]:
    """What encodes texts with one thread."""
    ranks = dict(trained.get_mergeable_ranks())
    if name == "rustbpe":
        call = trained.encode_to_numpy if to_numpy else trained.encode_batch
        return lambda texts: call(texts, num_threads=1)
    if name == "tokenizers":
        model = hugging_face(ranks)
        return lambda texts: [model.encode(text).ids for text in texts]
    encode: Callable = trained.encode
    if name == "tiktoken":
        oracle = tiktoken.Encoding(
            "t", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        encode = oracle.encode_to_numpy if to_numpy else oracle.encode_ordinary
    return lambda texts: [encode(text) for text in texts]


def under_load(call: Callable, texts: list[str], vocab_size: int) -> dict[str, float]:
    """Wall time of a training over that with one thread: median and maximum of the rounds.

    The two take turns, so that both meet the same load.
    """
    ratios = []
    for _ in range(LOAD_ROUNDS):
        start = time.perf_counter()
        learn(texts, vocab_size, num_threads=1)
        middle = time.perf_counter()
        call(texts)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return {"wall_ratio": statistics.median(ratios), "wall_ratio_max": max(ratios)}


def memory(name: str) -> float:
    """MB of this process, VmRSS now or VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1e3


def main() -> None:
    """One measurement: [job, group, name] in the first argument, the row on standard output."""
    job, group, name = json.loads(sys.argv[1])
    texts = json.loads(Path(job["path"]).read_text())
    some = texts["encode" if group == "train under load" else "train"]  # many rounds: the smaller
    if group.startswith("train"):
        call, results = training(name, job["vocab_size"])
    else:
        call = encoding(name, group == "to numpy", learn(some, job["vocab_size"]))
        half = len(texts["encode"]) // 2
        call(texts["encode"][:half])  # memory and caches are warm, the text is new
        some = texts["encode"][half:]

        def results(ids: Any) -> list[bytes]:
            arrays = [ids[0]] if isinstance(ids, tuple) else map(np.asarray, ids)
            return [b"".join(array.astype(np.uint32).tobytes() for array in arrays)]

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    cpu, wall = time.process_time(), time.perf_counter()
    result = call(some)
    row: dict[str, Any] = {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_megabytes": memory("VmHWM") - before,
        "megabytes": sum(len(text.encode()) for text in some) / 1e6,
    }
    if group == "train under load":
        row |= under_load(call, some, job["vocab_size"])
    row["digest"] = hashlib.sha256(b" ".join(results(result))).hexdigest()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
