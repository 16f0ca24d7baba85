"""Shards of pretraining text: parquet files with one string column `text`, read in row blocks.

The layout is FineWeb-Edu's. The last shard is for validation; of a single shard the last row group
is, of a single row group the last rows are: training and validation never share a document.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import print0
from nanochat.data import digests
from nanochat.data.digests import Digests

ROW_GROUP = 1024
ROWS_PER_SHARD = 16 * ROW_GROUP
VALIDATION_SHARE = 0.05  # of the only shard, where there is one
# what pyarrow raises for bytes that are no parquet: its own errors, and some of Python's
UNREADABLE = (OSError, ValueError, KeyError, pa.ArrowException)


@dataclass(frozen=True)
class RowBlock:
    """Rows [row_start, row_stop) of one row group of a shard: what one rank reads at a time.

    first_row  rows of the shard before the group.
    digests    of the shard; the group is checked against them when it is read.
    """

    path: Path
    row_group: int
    row_start: int
    row_stop: int
    first_row: int = 0
    digests: Digests | None = None

    def halves(self) -> "list[RowBlock]":
        """The block in two, or as it is where it holds one document."""
        middle = (self.row_start + self.row_stop) // 2
        bounds = ((self.row_start, middle), (middle, self.row_stop))
        return [replace(self, row_start=a, row_stop=b) for a, b in bounds if a < b]

    def column(self) -> pa.ChunkedArray:
        """The documents as an Arrow column of valid UTF-8 without nulls.

        Raises  ValueError naming the file if it cannot be read or holds a row without text.
        """
        try:
            if self.digests is not None:
                self.digests.check(self.path, self.row_group)
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                table = file.read_row_group(self.row_group, columns=["text"])
            column = table.column("text")[self.row_start : self.row_stop]
            column.validate(full=True)
        except UNREADABLE as error:
            raise ValueError(unreadable(self.path, str(error))) from error
        if column.null_count:
            raise ValueError(unreadable(self.path, f"a row of group {self.row_group} has no text"))
        return column

    def read(self) -> list[str]:
        """The documents. Raises ValueError as `column` does."""
        return self.column().to_pylist()


def unreadable(path: Path, reason: str) -> str:
    """The message of a shard that cannot be used."""
    return (
        f"shard {path} cannot be used: {reason}; delete and fetch it again, "
        "or leave such shards out with --skip_bad_shards"
    )


def list_shards(data_dir: Path) -> list[Path]:
    """The parquet files of a folder, by name.

    Raises  ValueError naming the folder and what to do if there is none.
    """
    shards = sorted(data_dir.glob("*.parquet")) if data_dir.is_dir() else []
    if not shards:
        raise ValueError(
            f"there is no parquet shard in {data_dir}; get text with python -m nanochat.dataset, "
            "or name a folder with --data_dir"
        )
    return shards


def row_blocks(data_dir: Path, split: str, skip_bad_shards: bool = False) -> list[RowBlock]:
    """Every block of a split, in order.

    Raises  ValueError for an unknown split, a folder without text, or a bad shard (unless skipped).
    """
    if split not in ("train", "val"):
        raise ValueError(f"split {split!r} is unknown; choose train or val")
    paths = reversed(list_shards(data_dir))
    good = filter(None, (_blocks_or_nothing(path, skip_bad_shards) for path in paths))
    blocks = next(good, None)
    if blocks is None:
        raise ValueError(f"every shard in {data_dir} is bad; fetch them again")
    # validation needs to know that there is another shard, not to read them all
    others = list(islice(good, 1 if split == "val" else None))
    if others:
        return blocks if split == "val" else list(chain.from_iterable(reversed(others)))
    # a single shard: hold out its last row groups, or the last rows of its only one
    if len(blocks) > 1:
        cut = len(blocks) - max(1, round(VALIDATION_SHARE * len(blocks)))
        return blocks[cut:] if split == "val" else blocks[:cut]
    (block,) = blocks
    rows = block.row_stop
    if rows < 2:
        raise ValueError(f"{block.path} has one document; two are needed to hold one out")
    cut = rows - max(1, round(VALIDATION_SHARE * rows))
    start, stop = (cut, rows) if split == "val" else (0, cut)
    return [replace(block, row_start=start, row_stop=stop)]


def _blocks_or_nothing(path: Path, skip_bad_shards: bool) -> list[RowBlock]:
    try:
        return shard_blocks(path)
    except ValueError as error:
        if not skip_bad_shards:
            raise
        print0(f"skipped: {error}")
        return []


def shard_blocks(path: Path) -> list[RowBlock]:
    """The row groups of a shard that hold rows.

    Raises  ValueError naming the file if it is damaged, or holds no column `text` of strings.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except UNREADABLE as error:
        raise ValueError(unreadable(path, str(error))) from error
    if "text" not in schema.names:
        raise ValueError(unreadable(path, f"no column `text` among {schema.names}"))
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(unreadable(path, f"column `text` holds {kind}, not strings"))
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if not sum(counts):
        raise ValueError(unreadable(path, "it has no rows"))
    try:
        known = digests.digests_of(path)
    except UNREADABLE as error:
        raise ValueError(unreadable(path, str(error))) from error
    firsts = accumulate(counts, initial=0)
    groups = enumerate(zip(counts, firsts, strict=False))  # firsts has one more, the total
    return [RowBlock(path, i, 0, count, first, known) for i, (count, first) in groups if count]


def identity(blocks: list[RowBlock]) -> str:
    """A digest of which documents the blocks are: their files, groups and rows."""
    files = {path: shard_digest(path) for path in {block.path for block in blocks}}
    lines = [f"{files[b.path]} {b.row_group} {b.row_start} {b.row_stop}\n" for b in blocks]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def shard_digest(path: Path) -> str:
    """A digest of a shard's name and whole content."""
    text = f"{path.name} {digests.digests_of(path).sha256}\n"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def share(blocks: list[RowBlock], rank: int, world_size: int) -> list[RowBlock]:
    """The blocks of one rank: every world_size-th, after cutting them where there are too few.

    Raises  ValueError if there are fewer documents than ranks.
    """
    # a small corpus may have fewer row groups than ranks: halve them until there are enough
    while len(blocks) < world_size:
        parts = [part for block in blocks for part in block.halves()]
        if len(parts) == len(blocks):
            raise ValueError(
                f"{len(blocks)} documents in {blocks[0].path.parent} are fewer than the "
                f"{world_size} ranks; use fewer ranks or more text"
            )
        blocks = parts
    return blocks[rank::world_size]


def iter_documents(data_dir: Path, split: str, skip_bad_shards: bool = False) -> Iterator[str]:
    """Every document of a split, once.

    Raises  ValueError as `row_blocks`, or naming the shard that cannot be read (unless skipped).
    """
    for block in row_blocks(data_dir, split, skip_bad_shards):
        try:
            documents = block.read()
        except ValueError as error:
            if not skip_bad_shards:
                raise
            print0(f"skipped: {error}")
            continue
        yield from documents


def write_shards(
    documents: Iterable[str],
    folder: Path,
    rows_per_shard: int = ROWS_PER_SHARD,
    row_group: int = ROW_GROUP,
) -> None:
    """Write documents as shards into `folder`, which appears whole by one rename.

    Raises  ValueError if there is no document.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        count, rows = 0, []
        for document in documents:
            rows.append(document)
            if len(rows) == rows_per_shard:
                _write_shard(temporary, count, rows, row_group)
                count, rows = count + 1, []
        if rows:
            _write_shard(temporary, count, rows, row_group)
        if not count and not rows:
            raise ValueError(f"no document was found for {folder}; is the source folder empty?")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shard(folder: Path, index: int, rows: list[str], row_group: int) -> None:
    path = folder / f"shard_{index:05d}.parquet"
    pq.write_table(
        pa.table({"text": rows}),
        path,
        row_group_size=row_group,
        compression="zstd",
        write_page_checksum=True,
    )
    digests.record(path, digests.compute(path))
