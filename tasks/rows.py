"""Rows of a data set, read from JSONL or parquet files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.files import read_json_lines

Row = dict[str, Any]


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class ParquetRows:
    """Rows of parquet files. They stay in Arrow's memory; a dict is made when a row is accessed.

    columns  which are read; none named are all
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        tables = []
        for path in paths:
            try:
                names = pq.read_schema(path).names
                if missing := set(columns) - set(names):
                    raise ValueError(f"no column {', '.join(sorted(missing))} among {names}")
                tables.append(pq.read_table(path, columns=list(columns) or None))
            except (ValueError, OSError, pa.ArrowException) as error:
                raise ValueError(f"{path}: {error}; delete it and fetch it again") from error
        self.table = pa.concat_tables(tables)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Row:
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


def read_rows(paths: Sequence[Path], columns: Sequence[str]) -> Rows:
    """Rows with these columns, of one JSONL file or of parquet files.

    Raises  ValueError naming the file, and the line of a JSONL file, if a row lacks a column or
            there are no rows.
    """
    parquet = paths[0].suffix == ".parquet"
    rows = ParquetRows(paths, columns) if parquet else _read_jsonl(paths[0], columns)
    if not rows:
        raise ValueError(f"{paths[0]} has no rows; delete it and fetch it again")
    return rows


def _read_jsonl(path: Path, columns: Sequence[str]) -> list[Row]:
    rows = []
    for where, row in read_json_lines(path):
        if not isinstance(row, dict) or not set(columns) <= set(row):
            raise ValueError(f"{where}: a row has {', '.join(columns)}; this is {row!r:.80}")
        rows.append(row)
    return rows
