"""Pretraining text: shards of parquet with one string column `text`, in FineWeb-Edu's layout.

    python -m nanochat.dataset                          the embedded corpus, without any download
    python -m nanochat.dataset --dataset=fineweb-edu -n 8 -w 4

The last shard is for validation; of a single shard the last row group is, of a single row group the
last rows are: training and validation never share a document.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from filelock import FileLock

from nanochat import command, configurator
from nanochat.common import get_base_dir, print0
from nanochat.data import embedded
from nanochat.data.hub import HUB, download
from nanochat.data.shards import row_blocks, write_shards
from nanochat.files import read_json_lines
from nanochat.settings import Choices, Count, CountOrMinusOne, require_known

EMBEDDED_FOLDER = "base_data_embedded"
NAMES = ("embedded", *HUB)
DATASETS = ("auto", *NAMES)  # what --dataset of the scripts may be


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
        there = (n for n, hub in HUB.items() if any((base_dir / hub.folder).glob("*.parquet")))
        dataset = next(there, "embedded")
        print0(f"dataset auto: {dataset}")
    if dataset == "embedded":
        return prepare_embedded(base_dir)
    require_known("dataset", dataset, DATASETS)
    return base_dir / HUB[dataset].folder


def prepare_embedded(base_dir: Path) -> Path:
    """Write the embedded corpus once; several processes may ask for it at a time."""
    folder = base_dir / EMBEDDED_FOLDER
    with FileLock(base_dir / f".{EMBEDDED_FOLDER}.lock"):
        if not folder.is_dir():
            print0(f"writing the embedded corpus to {folder}")
            documents = embedded.collect()
            write_shards(documents, folder, rows_per_shard=len(documents) // 4 + 1, row_group=128)
    return folder


def _imported(folder: Path, base_dir: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"data_dir {folder} is not a folder; name one with parquet, JSONL or text")
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
        if path.suffix == ".jsonl":
            for where, row in read_json_lines(path):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"{where}: a row has a `text`; this is {row!r:.80}")
                yield row["text"]
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be imported: {error}") from error


@dataclass(frozen=True)
class Settings:
    """Bring pretraining text."""

    dataset: Annotated[str, Choices(NAMES)] = "fineweb-edu"  # which text
    num_files: Annotated[CountOrMinusOne, tyro.conf.arg(aliases=["-n"])] = -1  # shards; -1 is all
    num_workers: Annotated[Count, tyro.conf.arg(aliases=["-w"])] = 4  # downloads at a time


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
    command.run(main)
