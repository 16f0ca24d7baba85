"""What a shard held when it was written, downloaded or first read: digests in a file beside it.

    shard_00000.parquet   ->   .shard_00000.parquet.digests.json

The SHA-256 of the whole file says which text it is, and is computed once: afterwards size and
modification time stand for it. Bits that rot change neither, so each part of the file has a digest
as well, checked whenever the part is read: a row group's text, and the tail with the footer.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
from filelock import FileLock

from nanochat.common import print0

CHUNK = 2**20
MAGIC_AND_LENGTH = 8  # bytes at the very end: the footer's length, then PAR1


@dataclass(frozen=True)
class Part:
    """Bytes [start, start + length) of a shard."""

    start: int
    length: int
    digest: str


@dataclass(frozen=True)
class Digests:
    """Digests of a shard.

    sha256      of the whole file
    downloaded  that is also what the Hub announced
    groups      the text of each row group
    tail        the footer
    """

    bytes: int
    mtime_ns: int
    sha256: str
    downloaded: bool
    groups: tuple[Part, ...]
    tail: Part

    def check(self, path: Path, row_group: int | None = None) -> None:
        """Raise ValueError where the footer, or that and a row group, are not what they were."""
        parts = {"footer": self.tail}
        if row_group is not None:
            parts[f"row group {row_group}"] = self.groups[row_group]
        with path.open("rb") as file:
            for name, part in parts.items():
                if _digest(file, part.start, part.length) != part.digest:
                    raise ValueError(f"its {name} has changed on the disk")


def digests_of(path: Path) -> Digests:
    """What is recorded of a shard, its footer checked; recorded now where nothing is.

    Raises  ValueError for a footer that has changed, or a shard that is not what was downloaded;
            pyarrow.ArrowException and OSError where it cannot be read.
    """
    known = _recorded(path)
    if known is None or not _is_of(known, path):
        # of several processes that begin at a time, one reads the shard
        with _alone(path.parent):
            known = _recorded(path)
            if known is None or not _is_of(known, path):
                found = compute(path)
                if known is not None and known.downloaded:
                    if found.sha256 != known.sha256:
                        raise ValueError("its SHA-256 is not that of the download any more")
                    found = compute(path, downloaded=True)
                record(path, found)
                return found
    known.check(path)
    return known


def compute(path: Path, downloaded: bool = False) -> Digests:
    """Read a shard whole."""
    stat = path.stat()
    if stat.st_size > 64 * CHUNK:
        print0(f"reading {path} once, for its digests")
    with pq.ParquetFile(path) as parquet:
        metadata, size = parquet.metadata, stat.st_size
        column = parquet.schema_arrow.names.index("text")
        chunks = [metadata.row_group(i).column(column) for i in range(metadata.num_row_groups)]
    with path.open("rb") as file:
        groups = []
        for chunk in chunks:
            start = chunk.data_page_offset
            if chunk.has_dictionary_page:
                start = min(start, chunk.dictionary_page_offset)
            length = chunk.total_compressed_size
            groups.append(Part(start, length, _digest(file, start, length)))
        file.seek(size - MAGIC_AND_LENGTH)
        footer = int.from_bytes(file.read(4), "little") + MAGIC_AND_LENGTH
        tail = Part(size - footer, footer, _digest(file, size - footer, footer))
        whole = _digest(file, 0, size)
    return Digests(size, stat.st_mtime_ns, whole, downloaded, tuple(groups), tail)


def record(path: Path, digests: Digests) -> None:
    """Write the digests beside a shard; a folder that cannot be written goes without."""
    target = _beside(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        # not synced: one that a power cut tears is computed again
        temporary.write_text(json.dumps(asdict(digests)))
        temporary.replace(target)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.digests.json")


def _recorded(path: Path) -> Digests | None:
    try:
        values = json.loads(_beside(path).read_text())
        groups = tuple(Part(**part) for part in values.pop("groups"))
        return Digests(groups=groups, tail=Part(**values.pop("tail")), **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _is_of(digests: Digests, path: Path) -> bool:
    stat = path.stat()
    return (digests.bytes, digests.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def _digest(file: BinaryIO, start: int, length: int) -> str:
    file.seek(start)
    digest = hashlib.sha256()
    while length > 0 and (chunk := file.read(min(CHUNK, length))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Among the processes of this folder; without a lock where it cannot be written."""
    lock = FileLock(folder / ".digests.lock")
    with contextlib.suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
