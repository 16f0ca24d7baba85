"""Small shards of text, and a tokenizer whose ids are the bytes."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.dataloader import Batches, DataLoader
from nanochat.text.tokenizer import byte_tokenizer
from nanochat.text.tokenizer_base import Tokenizer

BYTES = byte_tokenizer()
BOS = 256


def write(folder: Path, shards: list[list[str]], row_group: int = 3) -> Path:
    """Shards of these documents."""
    folder.mkdir()
    for index, texts in enumerate(shards):
        path = folder / f"shard_{index:05d}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group)
    return folder


def documents(start: int, count: int) -> list[str]:
    """Different documents of different lengths."""
    return [f"<{i}>" + "x" * (i * 7 % 23) for i in range(start, start + count)]


def break_row_group(path: Path, row_group: int) -> None:
    """Spoil the pages of a row group; the shard's footer stays as it is."""
    column = pq.read_metadata(path).row_group(row_group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)


def write_three(folder: Path) -> Path:
    """Seventeen documents to train on, in seven row groups, and eight for validation."""
    return write(folder, [documents(0, 10), documents(10, 7), documents(17, 8)])


def loader(
    folder: Path, split: str = "train", tokenizer: Tokenizer = BYTES, **options: Any
) -> DataLoader:
    """A DataLoader of small batches."""
    sizes = {"batch_size": 2, "sequence_len": 16} | options
    return DataLoader(tokenizer, folder, split, **sizes)


def take(batches: Batches, count: int) -> list[tuple[list, list]]:
    """(inputs, targets) of the next batches as lists; the source is closed."""
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return [(batch.inputs.tolist(), batch.targets.tolist()) for batch in taken]


def flat(batches: list[tuple[list, list]]) -> list[int]:
    """All inputs in a row."""
    return [token for inputs, _ in batches for row in inputs for token in row]


def rows(batches: list[tuple[list, list]]) -> list[list[int]]:
    """Rows of T + 1 tokens: the inputs and the last target."""
    pairs = itertools.chain.from_iterable(zip(*batch, strict=True) for batch in batches)
    return [[*inputs, targets[-1]] for inputs, targets in pairs]
