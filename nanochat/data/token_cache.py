"""Token shards: what the tokenizer makes of a text shard, written once and mapped into memory.

    <folder>/<tokenizer>/<text shard>-<digest>/
        tokens.bin     ids of all documents, each after a BOS, one after the other
        offsets.npy    (documents + 1,) int64: where each begins, and the end
        meta.json      type of the ids, SHA-256 of the two files

A shard appears atomically, by one rename. Several processes that need the same shards divide the
work between them. The files are checked when they are first read.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanochat.common import sha256_of
from nanochat.data.documents import DOCUMENTS_AT_ONCE, DocumentSource, TextSource
from nanochat.data.shards import RowBlock, shard_blocks, shard_digest
from nanochat.locks import LockedError, OwnedLock
from nanochat.text.tokenizer_base import Tokenizer

TOKENS, OFFSETS, META = "tokens.bin", "offsets.npy", "meta.json"
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class TokenShard:
    """A shard in memory: document i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "TokenShard":
        """Map a shard into memory.

        Raises  ValueError naming the shard if it is not what was written.
        """
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            for name, wanted in meta["sha256"].items():
                if sha256_of(path / name) != wanted:
                    raise ValueError(f"{name} has another SHA-256 than when it was written")
            if meta["dtype"] not in DTYPES:
                raise ValueError(f"ids of type {meta['dtype']}")
            # offsets are small and read whole; tokens stay on disk until a document is read
            offsets = np.load(path / OFFSETS)
            tokens = np.memmap(path / TOKENS, meta["dtype"], mode="r")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"token shard {path} is damaged ({error}); delete it, and it will be written again"
            ) from error
        return cls(tokens.view(np.ndarray), offsets)  # a slice of a memmap costs far more

    def documents(self, start: int, stop: int) -> list[np.ndarray]:
        """Documents start to stop - 1."""
        offsets = self.offsets[start : stop + 1].tolist()
        return [self.tokens[offsets[i] : offsets[i + 1]] for i in range(stop - start)]


class CachedSource(DocumentSource):
    """The documents of TextSource, from token shards; shards that are missing are written first.

    Raises  ValueError naming a text shard that cannot be read, or a token shard that is damaged.
    """

    def __init__(
        self, tokenizer: Tokenizer, blocks: Sequence[RowBlock], folder: Path, threads: int = 4
    ) -> None:
        super().__init__(blocks)
        folder = folder / tokenizer.fingerprint()[:16]
        paths = dict.fromkeys(block.path for block in blocks)
        self.shards = {path: folder / f"{path.stem}-{shard_digest(path)}" for path in paths}
        write_missing(tokenizer, self.shards, threads)
        self._open: dict[Path, TokenShard] = {}

    def read(self, number: int) -> tuple[list[np.ndarray], int]:
        index, row = self.locate(number)
        block = self.blocks[index]
        count = min(DOCUMENTS_AT_ONCE, block.row_stop - block.row_start - row)
        return self._documents(block, row, count), number + count

    def read_each(self, numbers: Iterable[int]) -> list[np.ndarray]:
        places = map(self.locate, numbers)
        return [self._documents(self.blocks[index], row, 1)[0] for index, row in places]

    def _documents(self, block: RowBlock, row: int, count: int) -> list[np.ndarray]:
        if block.path not in self._open:
            self._open[block.path] = TokenShard.open(self.shards[block.path])
        first = block.first_row + block.row_start + row
        return self._open[block.path].documents(first, first + count)


def write_missing(tokenizer: Tokenizer, shards: dict[Path, Path], threads: int) -> None:
    """Tokenize the text shards (keys) whose token shard (values) is not there.

    Raises  ValueError naming a text shard that cannot be read.
    """
    # Two passes divide the shards between processes without a plan: in the first each process
    # writes whatever no other has locked; in the second it waits for the others to finish theirs,
    # and writes what a process that died has left.
    for wait in (False, True):
        for number, (path, target) in enumerate(shards.items(), 1):
            if target.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with OwnedLock(target.with_name(f".{target.name}"), "let it finish", wait):
                    if not target.is_dir():  # another process may just have finished it
                        print(f"tokenizing {path} ({number} of {len(shards)})", flush=True)
                        _write(tokenizer, path, target, threads)
            except LockedError:
                continue


def _write(tokenizer: Tokenizer, path: Path, target: Path, threads: int) -> None:
    source = TextSource(tokenizer, shard_blocks(path), threads)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir()
    try:
        number, lengths, dtype = 0, [0], DTYPES[0]
        # a few documents at a time: their tokens are never all in memory
        with _durable(temporary / TOKENS) as file:
            while number < source.num_documents:
                documents, number = source.read(number)
                tokens = np.concatenate(documents)
                file.write(tokens.tobytes())
                lengths += map(len, documents)
                dtype = tokens.dtype.name
        with _durable(temporary / OFFSETS) as file:
            np.save(file, np.cumsum(lengths, dtype=np.int64))
        digests = {name: sha256_of(temporary / name) for name in (TOKENS, OFFSETS)}
        with _durable(temporary / META) as file:
            file.write(json.dumps({"dtype": dtype, "sha256": digests}).encode())
        temporary.rename(target)
    except ValueError as error:
        raise ValueError(f"the token cache takes shards whole: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk, not only in a cache, when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
