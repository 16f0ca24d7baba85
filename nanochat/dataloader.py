"""Text shards -> batches of token ids: streaming, tokenizing, distributed, exactly resumable.

A thread of its own reads and tokenizes ahead, so that a training step never waits for text. Rank r
reads every world_size-th block of rows; every document begins with BOS. Each
batch carries the state that continues right behind it, leftover tokens included: the batches
after a resume are the batches there would have been.

Letters  B rows of a batch, T tokens of a row.
"""

import queue
import threading
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanochat.dataset import RowBlock, identity, row_blocks, share
from nanochat.tokenizer_base import Tokenizer

STATE_VERSION = 2
PACKINGS = ("stream", "bestfit")
DOCUMENTS_AT_ONCE = 128  # tokenized together
BESTFIT_DOCUMENTS = 1000  # waiting to be placed
BATCHES_AHEAD = 4


class Batch(NamedTuple):
    """inputs and targets (B, T) int64, and the state that continues behind this batch."""

    inputs: Tensor
    targets: Tensor
    state: dict[str, Any]


class Batches(Protocol):
    """What hands out batches and can be closed: a DataLoader, or another source of them."""

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


@dataclass
class Cursor:
    """The next document to read: pass over the data, block of this rank, row within the block."""

    epoch: int = 0
    block: int = 0
    row: int = 0


class DocumentStream:
    """Token ids of one rank's documents, in order, over and over."""

    def __init__(self, tokenizer: Tokenizer, blocks: list[RowBlock], threads: int) -> None:
        self.tokenizer = tokenizer
        self.blocks = blocks
        self.threads = threads
        self.cursor = Cursor()
        self._loaded: tuple[int, list[str]] | None = None

    def next_documents(self) -> list[Tensor]:
        """Tokens of the next few documents, and move on."""
        cursor = self.cursor
        if self._loaded is None or self._loaded[0] != cursor.block:
            self._loaded = (cursor.block, self.blocks[cursor.block].read())
        texts = self._loaded[1]
        part = texts[cursor.row : cursor.row + DOCUMENTS_AT_ONCE]
        cursor.row += len(part)
        if cursor.row >= len(texts):
            cursor.row = 0
            cursor.block += 1
            if cursor.block == len(self.blocks):
                cursor.block = 0
                cursor.epoch += 1
        bos = self.tokenizer.get_bos_token_id()
        encoded = self.tokenizer.encode(part, prepend=bos, num_threads=self.threads)
        return [torch.tensor(ids, dtype=torch.int32) for ids in encoded]


class StreamPacker:
    """One endless row of tokens, cut into batches; rows overlap by the one token they predict."""

    def __init__(self, batch_size: int, sequence_len: int) -> None:
        self.B, self.T = batch_size, sequence_len
        self.documents: deque[Tensor] = deque()
        self.size = 0

    def add(self, documents: list[Tensor]) -> None:
        self.documents.extend(documents)
        self.size += sum(map(len, documents))

    def ready(self) -> bool:
        return self.size > self.B * self.T

    def pack(self) -> tuple[Tensor, Tensor]:
        need = self.B * self.T + 1
        taken, have = [], 0
        while have < need:
            document = self.documents.popleft()
            taken.append(document)
            have += len(document)
        tokens = torch.cat(taken)
        # the last token is an input of the next batch
        self.documents.appendleft(tokens[need - 1 :])
        self.size -= need - 1
        tokens = tokens[:need].long()
        return tokens[:-1].view(self.B, self.T), tokens[1:].view(self.B, self.T)


class BestFitPacker:
    """Rows that begin with a document: the longest that fits, again and again, the rest cropped."""

    def __init__(self, batch_size: int, sequence_len: int) -> None:
        self.B, self.T = batch_size, sequence_len
        self.documents: list[Tensor] = []  # by length, then by arrival
        self.lengths: list[int] = []

    def add(self, documents: list[Tensor]) -> None:
        for document in documents:
            at = bisect_right(self.lengths, len(document))
            self.documents.insert(at, document)
            insort(self.lengths, len(document))

    def ready(self) -> bool:
        return len(self.documents) >= BESTFIT_DOCUMENTS

    def _take(self, room: int) -> Tensor:
        fitting = bisect_right(self.lengths, room)
        at = fitting - 1 if fitting else 0  # nothing fits: crop the shortest
        self.lengths.pop(at)
        return self.documents.pop(at)[:room]

    def pack(self) -> tuple[Tensor, Tensor]:
        rows = torch.empty(self.B, self.T + 1, dtype=torch.int64)
        for row in rows:
            filled = 0
            while filled < len(row):
                part = self._take(len(row) - filled)
                row[filled : filled + len(part)] = part
                filled += len(part)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class DataLoader:
    """Iterator of Batch over a split, without end.

    packing  "stream" loses no token; "bestfit" begins every row with a document and crops the rest.
    state    of a Batch: continue behind it.
    Raises   ValueError for fewer documents than ranks, a state of another run, a bad shard.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        data_dir: Path,
        split: str,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        packing: str = "stream",
        threads: int = 4,
        state: dict[str, Any] | None = None,
        skip_bad_shards: bool = False,
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"packing {packing!r} is unknown; choose {' or '.join(PACKINGS)}")
        every = row_blocks(data_dir, split, skip_bad_shards)
        blocks = share(every, rank, world_size)
        self.identity = {
            "version": STATE_VERSION,
            "packing": packing,
            "world_size": world_size,
            "data": identity(every),
        }
        self.stream = DocumentStream(tokenizer, blocks, threads)
        self.packer = (StreamPacker if packing == "stream" else BestFitPacker)(
            batch_size, sequence_len
        )
        self.pin = torch.device(device).type == "cuda"
        if state is not None:
            self._restore(state)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=BATCHES_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True, name="dataloader")
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the producer is gone: whoever asks again learns it too
            raise item
        return item

    def close(self) -> None:
        """Stop the producer; the loader cannot be used afterwards."""
        self._stopped.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _produce(self) -> None:
        try:
            while not self._stopped.is_set():
                self._put(self._next_batch())
        except Exception as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _next_batch(self) -> Batch:
        while not self.packer.ready():
            self.packer.add(self.stream.next_documents())
        inputs, targets = self.packer.pack()
        if self.pin:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return Batch(inputs, targets, self._state())

    def _state(self) -> dict[str, Any]:
        cursor, documents = self.stream.cursor, list(self.packer.documents)
        block = self.stream.blocks[cursor.block]
        return self.identity | {
            "epoch": cursor.epoch,
            "pq_idx": block.path.name,
            "rg_idx": block.row_group,
            "block": cursor.block,
            "row": cursor.row,
            "tokens": torch.cat(documents) if documents else torch.empty(0, dtype=torch.int32),
            "lengths": torch.tensor([len(document) for document in documents]),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"the data position was saved with {name} = {state.get(name)}, this run has "
                    f"{value}; resume with the data, packing and number of ranks of that run"
                )
        self.stream.cursor = Cursor(state["epoch"], state["block"], state["row"])
        self.packer.add(list(state["tokens"].split(state["lengths"].tolist())))


class CUDAPrefetcher:
    """Copies the next batch to the GPU on a stream of its own while the current one is used.

    On other devices it hands batches on as they are.
    """

    def __init__(self, loader: Batches, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.side_stream is None:
            return next(self.loader)
        batch = self._ready or self._copy()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.side_stream)
        for tensor in (batch.inputs, batch.targets):
            # allocated on the side stream: not to be reused there before this stream is done
            tensor.record_stream(current)
        self._ready = self._copy()
        return batch

    def close(self) -> None:
        """Stop the loader."""
        self.loader.close()

    def _copy(self) -> Batch:
        batch = next(self.loader)
        with torch.cuda.stream(self.side_stream):
            return Batch(
                batch.inputs.to(self.device, non_blocking=True),
                batch.targets.to(self.device, non_blocking=True),
                batch.state,
            )


def tokenizing_distributed_data_loader_with_state(
    tokenizer: Tokenizer, data_dir: Path, B: int, T: int, split: str, **options: Any
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """(inputs, targets, state) of a DataLoader; options are its other arguments."""
    yield from DataLoader(tokenizer, data_dir, split, B, T, **options)


def tokenizing_distributed_data_loader(
    tokenizer: Tokenizer, data_dir: Path, B: int, T: int, split: str, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of a DataLoader; options are its other arguments."""
    for batch in DataLoader(tokenizer, data_dir, split, B, T, **options):
        yield batch.inputs, batch.targets
