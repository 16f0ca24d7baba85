"""Documents as token ids, numbered: where a batch gets its text from.

    TextSource      shards of text, tokenized while they are read
    Documents       any source's documents one by one

Document n of a source is row n % num_documents of its blocks; n // num_documents is the pass over
the data. Since a number determines a position, a state to resume from is a few numbers. With
three documents in all, 0 1 2 are the first pass, 3 4 5 the same documents in the second.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise

import numpy as np
import pyarrow as pa

from nanochat.data.shards import RowBlock
from nanochat.text.tokenizer_base import Tokenizer

DOCUMENTS_AT_ONCE = 128  # tokenized together: enough for several threads, a few milliseconds


def encode_documents(tokenizer: Tokenizer, texts: list[str], threads: int) -> list[np.ndarray]:
    """Ids of each text after a BOS, uint16 if every id of the vocabulary fits, else uint32."""
    bos = tokenizer.get_bos_token_id()
    tokens, offsets = tokenizer.encode_to_numpy(texts, prepend=bos, num_threads=threads)
    return [tokens[start:stop] for start, stop in pairwise(offsets.tolist())]


class DocumentSource(ABC):
    """Token ids of the documents of row blocks, numbered from 0 on, pass after pass."""

    def __init__(self, blocks: Sequence[RowBlock]) -> None:
        self.blocks = blocks
        self._starts = list(accumulate((b.row_stop - b.row_start for b in blocks), initial=0))
        self.num_documents = self._starts.pop()

    def locate(self, number: int) -> tuple[int, int]:
        """Index of a document's block, and its row within the block."""
        row = number % self.num_documents
        index = bisect_right(self._starts, row) - 1
        return index, row - self._starts[index]

    @abstractmethod
    def read(self, number: int) -> tuple[list[np.ndarray], int]:
        """A run of documents beginning with `number`, and the number of the one after them."""

    @abstractmethod
    def read_each(self, numbers: Iterable[int]) -> list[np.ndarray]:
        """These documents, in this order."""


class TextSource(DocumentSource):
    """Reads text a row group at a time.

    skip_bad_shards  print what cannot be read and leave it out, instead of raising.
    Raises           ValueError naming the file, on reading.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        blocks: Sequence[RowBlock],
        threads: int = 4,
        skip_bad_shards: bool = False,
    ) -> None:
        super().__init__(blocks)
        self.tokenizer = tokenizer
        self.threads = threads
        self.skip_bad_shards = skip_bad_shards
        self._bad: set[int] = set()
        self._loaded: tuple[int, pa.ChunkedArray] | None = None

    def read(self, number: int) -> tuple[list[np.ndarray], int]:
        index, row = self.locate(number)
        try:
            column = self._column(index)  # of the whole row group, kept for the next calls
        except ValueError as error:
            if not self.skip_bad_shards:
                raise
            self._note_bad(index, error)
            # no documents, and continue at the block after this one
            block = self.blocks[index]
            return [], number - row + block.row_stop - block.row_start
        texts = column[row : row + DOCUMENTS_AT_ONCE].to_pylist()
        return encode_documents(self.tokenizer, texts, self.threads), number + len(texts)

    def read_each(self, numbers: Iterable[int]) -> list[np.ndarray]:
        # neighbours in one row group are read together: resuming asks for about a thousand
        found: list[np.ndarray] = []
        places = groupby(map(self.locate, numbers), key=lambda place: place[0])
        for index, group in places:
            texts = self._column(index).take(pa.array([row for _, row in group])).to_pylist()
            found += encode_documents(self.tokenizer, texts, self.threads)
        return found

    def _column(self, index: int) -> pa.ChunkedArray:
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = (index, self.blocks[index].column())
        return self._loaded[1]

    def _note_bad(self, index: int, error: ValueError) -> None:
        if index not in self._bad:
            print(f"skipped: {error}", flush=True)  # on every rank: each reads other blocks
        self._bad.add(index)
        if len(self._bad) == len(self.blocks):
            raise ValueError(f"all {len(self.blocks)} row groups are bad; the last: {error}")


class Documents:
    """(number, token ids) of each document of a source, from `position` on, without end.

    position  number of the next document.
    """

    def __init__(self, source: DocumentSource, position: int = 0) -> None:
        self.source = source
        self.position = position
        self._next_read = position  # number after the documents that have been read
        self._read: deque[tuple[int, np.ndarray]] = deque()

    def __iter__(self) -> "Documents":
        return self

    def __next__(self) -> tuple[int, np.ndarray]:
        while not self._read:
            first = self._next_read
            documents, self._next_read = self.source.read(first)
            self._read.extend(enumerate(documents, first))
        number, tokens = self._read.popleft()
        self.position = number + 1
        return number, tokens
