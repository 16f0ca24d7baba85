"""The data loader against the usual one in line: lists of tokens, a search for every document.

    NANOCHAT_BASE_DIR=DIR pytest bench/test_dataloader.py   shards of DIR/base_data, some minutes
    pytest bench/test_dataloader.py                         the embedded corpus, a minute
    ... --out=bench/results/cpu                             and write dataloader.json there

Two things of each contender, turn by turn: batches one after the other as fast as they come
(tokens/s, of wall time and of CPU time, which holds on a busy machine too), and batches asked for
at the pace of a training run, whose step is a sleep (milliseconds that the step has to wait).
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.report import aligned
from bench.session import write_document
from nanochat.common import get_base_dir
from nanochat.data.dataloader import BATCHES_AHEAD, Batch, CUDAPrefetcher, DataLoader
from nanochat.data.shards import RowBlock, iter_documents, row_blocks
from nanochat.dataset import resolve_data_dir
from nanochat.report import table
from nanochat.text.tokenizer import RustBPETokenizer

CPU = torch.device("cpu")
CONSUMPTION = 0.8e6  # tokens/s that a d12 on an H200 uses up, as estimated
BASELINE = "in line, tiktoken"
OURS = ("stream", "bestfit", "stream, token cache", "bestfit, token cache")
NAMES = (BASELINE, "in line, rustbpe", *OURS)
CASES = [(turn, name) for turn in range(4) for name in NAMES]
THREADS = 4
WARM = BATCHES_AHEAD + 4  # batches that are not timed: those that were waiting, and a few
REAL = {"B": 32, "T": 2048, "train_chars": 60_000_000, "vocab_size": 65_536, "batches": 60}
SMALL = {"B": 16, "T": 1024, "train_chars": 2_000_000, "vocab_size": 4_096, "batches": 20}
Sizes = dict[str, int]


class InLine:
    """Best fit without a thread: documents as lists in a list, searched through for each pick."""

    def __init__(
        self,
        encode: Callable[[list[str]], list[list[int]]],
        blocks: list[RowBlock],
        batch_size: int,
        sequence_len: int,
        waiting: int = 1000,
        at_once: int = 128,
    ) -> None:
        self.encode, self.waiting = encode, waiting
        self.texts = self._read(blocks, at_once)
        self.documents: list[list[int]] = []
        self.rows = torch.empty(batch_size, sequence_len + 1, dtype=torch.int64)

    @staticmethod
    def _read(blocks: list[RowBlock], at_once: int) -> Iterator[list[str]]:
        for block in cycle(blocks):
            texts = block.read()
            for start in range(0, len(texts), at_once):
                yield texts[start : start + at_once]

    def __next__(self) -> tuple[Tensor, Tensor]:
        for row in self.rows:
            filled = 0
            while filled < len(row):
                while len(self.documents) < self.waiting:
                    self.documents += self.encode(next(self.texts))
                tokens = self._take(len(row) - filled)
                row[filled : filled + len(tokens)] = torch.tensor(tokens)
                filled += len(tokens)
        return self.rows[:, :-1].clone(), self.rows[:, 1:].clone()

    def _take(self, room: int) -> list[int]:
        best, longest = -1, 0
        for i, document in enumerate(self.documents):
            if longest < len(document) <= room:
                best, longest = i, len(document)
        if best >= 0:
            return self.documents.pop(best)
        shortest = min(range(len(self.documents)), key=lambda i: len(self.documents[i]))
        return self.documents.pop(shortest)[:room]


@dataclass
class World:
    """Text, tokenizer, and how far each contender has come: every turn is on new text."""

    data_dir: Path
    cache: Path
    tokenizer: RustBPETokenizer
    sizes: Sizes
    in_line: dict[str, InLine] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    drained: dict[str, list[float]] = field(default_factory=dict)  # seconds of each batch
    paced: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)  # seconds of all drained batches

    def open(self, name: str) -> tuple[InLine | CUDAPrefetcher, Callable[[], None]]:
        """A loader, and what ends it."""
        sizes = self.sizes
        if name not in OURS:
            if name not in self.in_line:
                encoder = RustBPETokenizer(
                    self.tokenizer.encoding, "tiktoken" if name == BASELINE else "rustbpe"
                )
                bos = encoder.get_bos_token_id()
                self.in_line[name] = InLine(
                    lambda texts: encoder.encode(texts, prepend=bos, num_threads=THREADS),
                    row_blocks(self.data_dir, "train"),
                    sizes["B"],
                    sizes["T"],
                )
            return self.in_line[name], lambda: None
        loader = DataLoader(
            self.tokenizer,
            self.data_dir,
            "train",
            sizes["B"],
            sizes["T"],
            packing=name.split(",")[0],
            threads=THREADS,
            state=self.states.get(name),
            token_cache=self.cache if "cache" in name else None,
        )
        prefetcher = CUDAPrefetcher(loader, CPU)
        return prefetcher, prefetcher.close


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base_dir = get_base_dir()
    real = any((base_dir / "base_data").glob("*.parquet"))
    data_dir = resolve_data_dir("fineweb-edu" if real else "embedded", "", base_dir)
    sizes = REAL if real else SMALL

    def some() -> Iterator[str]:
        room = sizes["train_chars"]
        for text in iter_documents(data_dir, "train"):
            yield text[:10_000]
            room -= len(text[:10_000])
            if room < 0:
                return

    tokenizer = RustBPETokenizer.train_from_iterator(some(), sizes["vocab_size"])
    return World(data_dir, tmp_path_factory.mktemp("cache"), tokenizer, sizes)


@pytest.mark.parametrize(("turn", "name"), CASES)
def test_contender(turn: int, name: str, world: World, benchmark: BenchmarkFixture) -> None:
    source, close = world.open(name)
    for _ in range(WARM):
        next(source)
    rounds, pause = world.sizes["batches"], world.sizes["B"] * world.sizes["T"] / CONSUMPTION

    def timed(times: dict[str, list[float]]) -> None:
        begin = time.perf_counter()
        batch = next(source)
        times.setdefault(name, []).append(time.perf_counter() - begin)
        if isinstance(batch, Batch):
            world.states[name] = batch.state

    cpu = time.process_time()
    benchmark.pedantic(timed, args=(world.drained,), rounds=rounds)
    world.cpu[name] = world.cpu.get(name, 0.0) + time.process_time() - cpu
    for _ in range(rounds):
        time.sleep(pause)
        timed(world.paced)
    close()


def test_results(
    world: World, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, and the rows of a file."""
    tokens = world.sizes["B"] * world.sizes["T"]
    rows: list[dict[str, Any]] = []
    for name, drained in world.drained.items():
        row: dict[str, Any] = {"name": name, "batches": len(drained)}
        row["tokens_per_s"] = tokens * len(drained) / sum(drained)
        row["tokens_per_cpu_s"] = tokens * len(drained) / world.cpu[name]
        for kind, seconds in (("drained", drained), ("paced", world.paced[name])):
            for share in (50, 99, 100):
                row[f"{kind}_p{share}_ms"] = float(np.percentile(seconds, share)) * 1e3
        first = rows[0] if rows else row
        row["speedup"] = row["tokens_per_s"] / first["tokens_per_s"]
        row["cpu_speedup"] = row["tokens_per_cpu_s"] / first["tokens_per_cpu_s"]
        row["paced_p99_ratio"] = first["paced_p99_ms"] / row["paced_p99_ms"]
        rows.append(row)
    columns = {
        "contender": "name", "tok/s": "tokens_per_s", "x": "speedup",
        "tok/CPU s": "tokens_per_cpu_s", "x CPU": "cpu_speedup",
        "a step waits, p50 ms": "paced_p50_ms", "p99 ms": "paced_p99_ms",
        "max ms": "paced_p100_ms", "p99 1/x": "paced_p99_ratio",
    }  # fmt: skip
    lines = [[row[name] for name in columns.values()] for row in rows]
    with capsys.disabled():
        print("\n" + aligned(table(tuple(columns), lines)))
    known = {"load": os.getloadavg(), "threads": THREADS, "text": world.data_dir.name}
    known |= {"pace_tokens_per_s": CONSUMPTION} | world.sizes
    write_document(request.config, "dataloader.json", {**known, "rows": rows})
