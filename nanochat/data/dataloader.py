"""Text shards -> batches of token ids: streaming, tokenizing, distributed, exactly resumable.

    DataLoader        makes the batches one by one; each carries the state to resume after it
    CUDAPrefetcher    runs a loader ahead in a thread and copies to the GPU on a stream of its own

Rank r reads every world_size-th block of rows; with a token cache all ranks walk through the same
documents, and the state fits any number of ranks. Every document begins with BOS. The batches
after a resume are the batches there would have been.

Letters  B rows of a batch, T tokens of a row.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.data.documents import Documents, DocumentSource, TextSource
from nanochat.data.shards import identity, row_blocks, share
from nanochat.data.token_cache import CachedSource
from nanochat.settings import require_known
from nanochat.text.tokenizer_base import Tokenizer

STATE_VERSION = 3
BESTFIT_DOCUMENTS = 1000  # waiting to be placed
BATCHES_AHEAD = 4  # a row group is read and its first documents tokenized within one of them


class Batch(NamedTuple):
    """inputs and targets (B, T) int64, and the state to resume after this batch."""

    inputs: Tensor
    targets: Tensor
    state: dict[str, Any]


class Batches(Protocol):
    """What hands out batches and can be closed: a DataLoader, or another source of them."""

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class StreamPacker:
    """One endless row of tokens, cut into batches; rows overlap by the one token they predict.

    pack     fills the (2, B, T) inputs and targets of the next batch; without them, passes it over
    state    plain values; `restore` continues after the batch of these
    """

    def __init__(self, source: DocumentSource, batch_size: int, sequence_len: int) -> None:
        self.B, self.T = batch_size, sequence_len
        self.documents = Documents(source)
        self.number, self.document = 0, np.empty(0, np.uint16)
        self.start = 0  # of the document's tokens that are not used yet
        self._row = np.empty(batch_size * sequence_len + 1, np.int64)

    def pack(self, pair: np.ndarray | None) -> None:
        row, filled = self._row, 0
        while filled < len(row):
            if self.start == len(self.document):  # used up: open the next one
                self.number, self.document = next(self.documents)
                self.start = 0
            part = self.document[self.start : self.start + len(row) - filled]
            if pair is not None:
                row[filled : filled + len(part)] = part
            filled += len(part)
            self.start += len(part)
        self.start -= 1  # the last target is the next input
        if pair is not None:
            pair[0] = row[:-1].reshape(self.B, self.T)
            pair[1] = row[1:].reshape(self.B, self.T)

    def state(self) -> dict[str, Any]:
        return {"document": self.number, "offset": self.start}

    def restore(self, state: dict[str, Any]) -> None:
        self.documents = Documents(self.documents.source, state["document"])
        self.number, self.document = next(self.documents)
        self.start = state["offset"]


class BestFitPacker:
    """Rows that begin with a document: the longest that fits, again and again, the last cropped.

    Packs, and tells its state, as StreamPacker does. Rows of 8 tokens, and documents of 6, 5, 3, 3
    and 2 tokens that wait:

        6 6 6 6 6 6 2 2    6 is the longest that fits, then 2 fills the rest
        5 5 5 5 5 3 3 3
        3 3 3 ...          if nothing that waits fits the rest, the shortest document is cropped

    A document longer than a row is cropped to one when it arrives. If it waited whole it would
    never fit, take up space in the window, and be cropped in the end where a short one loses less.
    """

    def __init__(self, source: DocumentSource, batch_size: int, sequence_len: int) -> None:
        self.B, self.T = batch_size, sequence_len
        self.documents = Documents(source)
        self.window = min(BESTFIT_DOCUMENTS, source.num_documents)
        # (length, -number, tokens), sorted: the last that fits is the oldest of the longest
        self.waiting: list[tuple[int, int, np.ndarray]] = []
        self._rows = np.empty((batch_size, sequence_len + 1), np.int64)

    def _add(self, number: int, document: np.ndarray) -> None:
        document = document[: self.T + 1]
        insort(self.waiting, (len(document), -number, document))

    def _take(self, room: int) -> np.ndarray:
        while len(self.waiting) < self.window:
            self._add(*next(self.documents))
        # (room, 1) sorts after every document of length `room`, whose second element is <= 0
        fitting = bisect_right(self.waiting, (room, 1))
        # nothing fits: crop the shortest
        return self.waiting.pop(max(0, fitting - 1))[2][:room]

    def pack(self, pair: np.ndarray | None) -> None:
        for row in self._rows:
            filled = 0
            while filled < len(row):
                part = self._take(len(row) - filled)
                if pair is not None:
                    row[filled : filled + len(part)] = part
                filled += len(part)
        if pair is not None:
            pair[0], pair[1] = self._rows[:, :-1], self._rows[:, 1:]

    def state(self) -> dict[str, Any]:
        # numbers only; a resumed run reads and tokenizes these documents again
        waiting = np.sort(np.fromiter((-entry[1] for entry in self.waiting), np.int64))
        return {"document": self.documents.position, "waiting": torch.from_numpy(waiting)}

    def restore(self, state: dict[str, Any]) -> None:
        source, numbers = self.documents.source, state["waiting"].tolist()
        self.documents = Documents(source, state["document"])
        for number, document in zip(numbers, source.read_each(numbers), strict=True):
            self._add(number, document)


PACKERS: dict[str, type[StreamPacker] | type[BestFitPacker]] = {
    "stream": StreamPacker,
    "bestfit": BestFitPacker,
}


class DataLoader:
    """Iterator of Batch over a split, without end.

    device       where the batches will go: for a GPU they lie in pinned memory.
    packing      "stream" loses no token; "bestfit" begins every row with a document and crops.
    threads      of the tokenizer; they do not change the batches.
    state        of a Batch: continue after it.
    token_cache  folder of token shards, which are written first where they are missing.
    Raises       ValueError for fewer documents than ranks, a state of another run, a bad shard.
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
        token_cache: Path | None = None,
    ) -> None:
        require_known("packing", packing, PACKERS)
        blocks = row_blocks(data_dir, split, skip_bad_shards)
        self.identity = {
            "version": STATE_VERSION,
            "packing": packing,
            "world_size": world_size if token_cache is None else "any",
            "data": identity(blocks),
            "tokenizer": tokenizer.fingerprint()[:16],
        }
        if token_cache is None:
            own = share(blocks, rank, world_size)
            self.source = TextSource(tokenizer, own, threads, skip_bad_shards)
            self.turns = (True,)
        else:
            self.source = CachedSource(tokenizer, blocks, token_cache, threads)
            # of each round of batches, one for each rank, this rank copies out its own
            self.turns = tuple(turn == rank for turn in range(world_size))
        paths = dict.fromkeys(block.path for block in blocks)
        self.file_numbers = {path: number for number, path in enumerate(paths)}
        self.shape = (2, batch_size, sequence_len)
        self.pin = torch.device(device).type == "cuda"
        self.packer = PACKERS[packing](self.source, batch_size, sequence_len)
        if state is not None:
            self._restore(state)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # PyTorch's host allocator hands a pinned block out again when the copies from it are done
        pair = torch.empty(self.shape, dtype=torch.int64, pin_memory=self.pin)
        # with a token cache every rank packs all ranks' batches, and copies out only its own
        for own in self.turns:
            self.packer.pack(pair.numpy() if own else None)
        return Batch(pair[0], pair[1], self._state())

    def close(self) -> None:
        """Nothing is held open; here so that every loader can be closed."""

    def _state(self) -> dict[str, Any]:
        packed = self.packer.state()
        index, _ = self.source.locate(packed["document"])
        block = self.source.blocks[index]
        return {
            **self.identity,
            "epoch": packed["document"] // self.source.num_documents,
            "pq_idx": self.file_numbers[block.path],
            "rg_idx": block.row_group,
            **packed,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"the data position was saved with {name} = {state.get(name)}, this run has "
                    f"{value}; resume with the data, tokenizer, packing, token cache or none, and "
                    "without the cache the number of ranks of that run"
                )
        self.packer.restore(state)


class CUDAPrefetcher:
    """Runs a loader a few batches ahead in a thread, and copies them to the device there.

    A batch on a GPU may be used on the stream that is current when it is handed out. What the
    loader raises is raised in the place of its batch, and again whenever another is asked for.
    """

    def __init__(self, loader: Batches, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetcher")
        self._ahead: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()
        for _ in range(BATCHES_AHEAD):
            self._ahead.append(self._thread.submit(self._fetch))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise ValueError("this prefetcher is closed; make another one")
        batch, copied = self._ahead[0].result()  # one that failed stays the first
        self._ahead.popleft()
        self._ahead.append(self._thread.submit(self._fetch))
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in (batch.inputs, batch.targets):
                # allocated on the side stream: not to be reused there before this stream is done
                tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """End the thread and the loader; batches that were not asked for are lost."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
        self.loader.close()

    def _fetch(self) -> tuple[Batch, torch.cuda.Event | None]:
        if self.side_stream is None:
            batch = next(self.loader)
            return self._to_device(batch), None
        # also makes the GPU this thread's current one, for which memory is pinned
        with torch.cuda.stream(self.side_stream):
            batch, copied = self._to_device(next(self.loader)), torch.cuda.Event()
            copied.record(self.side_stream)
            return batch, copied

    def _to_device(self, batch: Batch) -> Batch:
        asynchronous = self.side_stream is not None
        inputs, targets = (
            t.to(self.device, non_blocking=asynchronous) for t in (batch.inputs, batch.targets)
        )
        return batch._replace(inputs=inputs, targets=targets)


def tokenizing_distributed_data_loader_with_state(
    tokenizer: Tokenizer,
    data_dir: Path,
    B: int,
    T: int,
    split: str,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """(inputs, targets, state) on the device; options are the other arguments of DataLoader."""
    loader = DataLoader(tokenizer, data_dir, split, B, T, device=device, **options)
    batches = CUDAPrefetcher(loader, torch.device(device))
    try:
        yield from batches
    finally:
        batches.close()


def tokenizing_distributed_data_loader(
    tokenizer: Tokenizer, data_dir: Path, B: int, T: int, split: str, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) on the device; options as above."""
    batches = tokenizing_distributed_data_loader_with_state(
        tokenizer, data_dir, B, T, split, **options
    )
    for inputs, targets, _ in batches:
        yield inputs, targets
