"""The usual loader, which bench/test_dataloader.py measures against: best fit, as first written."""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor

from nanochat.data.shards import RowBlock


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
