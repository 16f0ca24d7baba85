"""Pretraining text: shards of parquet with one string column `text`, in FineWeb-Edu's layout.

    python -m nanochat.dataset                          the embedded corpus, without any download
    python -m nanochat.dataset --dataset=fineweb-edu -n 8 -w 4

The last shard is for validation; of a single shard the last row group is, of a single row group the
last rows are: training and validation never share a document.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from filelock import FileLock

from nanochat import configurator, embedded_corpus
from nanochat.common import get_base_dir, print0
from nanochat.hub_dataset import HUB, download

ROW_GROUP = 1024
ROWS_PER_SHARD = 16 * ROW_GROUP
VALIDATION_SHARE = 0.05  # of the only shard, where there is one


EMBEDDED_FOLDER = "base_data_embedded"
NAMES = ("embedded", *HUB)


@dataclass(frozen=True)
class RowBlock:
    """Rows [row_start, row_stop) of one row group of a shard: what one rank reads at a time."""

    path: Path
    row_group: int
    row_start: int
    row_stop: int

    def halves(self) -> "list[RowBlock]":
        """The block in two, or as it is where it holds one document."""
        middle = (self.row_start + self.row_stop) // 2
        bounds = ((self.row_start, middle), (middle, self.row_stop))
        return [RowBlock(self.path, self.row_group, a, b) for a, b in bounds if a < b]

    def read(self) -> list[str]:
        """The documents.

        Raises  ValueError naming the file if it cannot be read or holds a row without text.
        """
        try:
            table = pq.ParquetFile(self.path).read_row_group(self.row_group, columns=["text"])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(unreadable(self.path, str(error))) from error
        texts = table.column("text").to_pylist()[self.row_start : self.row_stop]
        if any(text is None for text in texts):
            raise ValueError(unreadable(self.path, f"a row of group {self.row_group} has no text"))
        return texts


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
    shards: list[list[RowBlock]] = []
    for path in list_shards(data_dir):
        try:
            shards.append(_blocks_of(path))
        except ValueError as error:
            if not skip_bad_shards:
                raise
            print0(f"skipped: {error}")
    if not shards:
        raise ValueError(f"every shard in {data_dir} is bad; fetch them again")
    if len(shards) > 1:
        return shards[-1] if split == "val" else [b for shard in shards[:-1] for b in shard]
    (blocks,) = shards
    if len(blocks) > 1:
        cut = len(blocks) - max(1, round(VALIDATION_SHARE * len(blocks)))
        return blocks[cut:] if split == "val" else blocks[:cut]
    (block,) = blocks
    rows = block.row_stop
    if rows < 2:
        raise ValueError(f"{block.path} has one document; two are needed to hold one out")
    cut = rows - max(1, round(VALIDATION_SHARE * rows))
    start, stop = (cut, rows) if split == "val" else (0, cut)
    return [RowBlock(block.path, block.row_group, start, stop)]


def _blocks_of(path: Path) -> list[RowBlock]:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(unreadable(path, str(error))) from error
    if "text" not in metadata.schema.names:
        raise ValueError(unreadable(path, f"no column `text` among {metadata.schema.names}"))
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if not sum(counts):
        raise ValueError(unreadable(path, "it has no rows"))
    return [RowBlock(path, i, 0, count) for i, count in enumerate(counts) if count]


def identity(blocks: list[RowBlock]) -> str:
    """A digest of which documents the blocks are: names and sizes of files, groups, rows."""
    lines = [
        f"{b.path.name} {b.path.stat().st_size} {b.row_group} {b.row_start} {b.row_stop}\n"
        for b in blocks
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def share(blocks: list[RowBlock], rank: int, world_size: int) -> list[RowBlock]:
    """The blocks of one rank: every world_size-th, after cutting them where there are too few.

    Raises  ValueError if there are fewer documents than ranks.
    """
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
    """Every document of a split, once."""
    for block in row_blocks(data_dir, split, skip_bad_shards):
        yield from block.read()


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
    pq.write_table(
        pa.table({"text": rows}),
        folder / f"shard_{index:05d}.parquet",
        row_group_size=row_group,
        compression="zstd",
    )


def resolve_data_dir(dataset: str, data_dir: str, base_dir: Path) -> Path:
    """The folder of parquet shards that the two settings stand for.

    dataset   embedded (written here the first time), fineweb-edu or climbmix (downloaded before),
              or auto: the first of the downloaded ones that is there, otherwise embedded.
    data_dir  a folder of parquet shards, used in place, or of JSONL or text files, imported once.
    Raises    ValueError for an unknown name or a folder without text.
    """
    if data_dir:
        return _imported(Path(data_dir).expanduser(), base_dir)
    if dataset == "auto":
        there = (name for name, hub in HUB.items() if (base_dir / hub.folder).is_dir())
        dataset = next(there, "embedded")
        print0(f"dataset auto: {dataset}")
    if dataset == "embedded":
        return prepare_embedded(base_dir)
    if dataset not in HUB:
        raise ValueError(f"dataset {dataset!r} is unknown; choose auto, {', '.join(NAMES)}")
    return base_dir / HUB[dataset].folder


def prepare_embedded(base_dir: Path) -> Path:
    """Write the embedded corpus once; several processes may ask for it at a time."""
    folder = base_dir / EMBEDDED_FOLDER
    with FileLock(base_dir / f".{EMBEDDED_FOLDER}.lock"):
        if not folder.is_dir():
            print0(f"writing the embedded corpus to {folder}")
            documents = embedded_corpus.collect()
            write_shards(documents, folder, rows_per_shard=len(documents) // 4 + 1, row_group=128)
    return folder


def _imported(folder: Path, base_dir: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"data_dir {folder} is no folder; name one with parquet, JSONL or text")
    if any(folder.glob("*.parquet")):
        return folder
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".jsonl", ".txt", ".md"))
    if not files:
        raise ValueError(f"{folder} holds no .parquet, .jsonl, .txt or .md file")
    stamp = "".join(f"{p}{p.stat().st_size}{p.stat().st_mtime_ns}" for p in files)
    name = f"{folder.resolve().name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    target = base_dir / "imported" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if not target.is_dir():
            write_shards(_read_files(files), target, row_group=64)
    return target


def _read_files(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            if path.suffix != ".jsonl":
                yield path.read_text(encoding="utf-8")
                continue
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    text = json.loads(line)["text"]
                    if not isinstance(text, str):
                        raise ValueError(f"line {number}: `text` is {type(text).__name__}")
                    yield text
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be imported: {error!r}") from error


@dataclass(frozen=True)
class Settings:
    """Bring pretraining text."""

    dataset: str = "fineweb-edu"  # embedded, fineweb-edu or climbmix
    num_files: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1  # shards to download; -1 is all
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4  # downloads at a time


def main() -> None:
    settings = configurator.load(Settings)
    base_dir = get_base_dir()
    if settings.dataset in HUB:
        hub = HUB[settings.dataset]
        download(hub, settings.num_files, settings.num_workers, base_dir / hub.folder)
    folder = resolve_data_dir(settings.dataset, "", base_dir)
    for split in ("train", "val"):
        blocks = row_blocks(folder, split)
        rows = sum(block.row_stop - block.row_start for block in blocks)
        print0(f"{folder} {split}: {rows:,} documents in {len(blocks)} row groups")


if __name__ == "__main__":
    main()
