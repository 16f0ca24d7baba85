"""The files of a task: in a local folder, or downloaded from the Hugging Face Hub into one.

Below the folder (--task_data, otherwise <base dir>/task_data), a split of a task is one file, or
shards that are named as on the Hub:

    gsm8k/main/test.jsonl    gsm8k/main/test.parquet    gsm8k/main/test-00000-of-00001.parquet

A download keeps the Hub's names, so that both kinds of folder look alike.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat.common import get_base_dir

Row = dict[str, Any]
FOLDER = "task_data"
SHARD = re.compile(r".*-of-([0-9]+)\.parquet")


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class Source:
    """Where the rows of a task are.

    repository, revision  on the Hugging Face Hub; the commit is fixed, so rows never change
    places                folders below the data folder, by preference; in the first of them, what
                          follows the first slash is the folder of the repository
    splits, columns       what there must be
    """

    repository: str
    revision: str
    places: tuple[str, ...]
    splits: tuple[str, ...]
    columns: tuple[str, ...]

    def load(self, split: str, task_data: Path | str = "", endpoint: str | None = None) -> Rows:
        """The rows of a split, in the order of the files.

        task_data  a folder to read from; empty downloads what is not there yet
        endpoint   address of the Hub; None is the library's
        Raises     ValueError for an unknown split, a missing file or one that cannot be read.
        """
        if split not in self.splits:
            raise ValueError(
                f"{self.repository} has no split {split!r}; choose {', '.join(self.splits)}"
            )
        folder = data_folder(task_data)
        if not task_data:
            self.download(folder, split, endpoint)
        files = self.find(folder, split)
        if not files:
            raise ValueError(
                f"{folder / self.places[-1] / split}.jsonl is missing (or .parquet, or shards "
                f"{split}-00000-of-00001.parquet, also in {folder / self.places[0]}); put it there "
                "(docs/adding_a_task.md shows the layout), or leave --task_data out to download it"
            )
        return read_rows(files, self.columns)

    def find(self, folder: Path, split: str) -> list[Path]:
        """The files of a split, none if they are not all there."""
        for place in (folder / name for name in self.places):
            for name in (f"{split}.jsonl", f"{split}.parquet"):
                if (place / name).is_file():
                    return [place / name]
            shards = sorted(place.glob(f"{split}-*-of-*.parquet"))
            if shards and (match := SHARD.fullmatch(shards[0].name)):
                return shards if len(shards) == int(match[1]) else []
        return []

    def download(self, folder: Path, split: str, endpoint: str | None = None) -> None:
        """Fetch the shards of a split, going on where it stopped; safe with several ranks.

        Raises  ValueError naming repository and remedy where the Hub does not deliver.
        """
        name, _, inner = self.places[0].partition("/")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            if self.find(folder, split):
                return
            cause: OSError | None = None
            try:
                huggingface_hub.snapshot_download(
                    self.repository,
                    repo_type="dataset",
                    revision=self.revision,
                    allow_patterns=f"{inner}/{split}-*.parquet",
                    local_dir=folder / name,
                    endpoint=endpoint,
                )
            except OSError as error:
                cause = error
            # the library is content with what is there already when it cannot reach the Hub
            if not self.find(folder, split):
                reason = str(cause).partition("\n")[0] if cause else "the Hub has no such files"
                raise ValueError(
                    f"cannot download {inner}/{split}-*.parquet of {self.repository}: {reason}; "
                    "try again to go on where it stopped, or name a folder that has "
                    f"{self.places[-1]}/{split}.jsonl with --task_data"
                ) from cause


def data_folder(task_data: Path | str = "") -> Path:
    """The folder of task files; empty is the one that downloads go to.

    Raises  ValueError for a named folder that is none.
    """
    if not task_data:
        return get_base_dir() / FOLDER
    folder = Path(task_data).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"task_data {folder} is no folder; name one, or leave it out to download from the Hub"
        )
    return folder


class ParquetRows:
    """Rows of parquet files; they stay in Arrow's memory, a dict is made of one when asked for."""

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        tables = []
        for path in paths:
            try:
                names = pq.read_schema(path).names
                if missing := set(columns) - set(names):
                    raise ValueError(f"no column {', '.join(sorted(missing))} among {names}")
                tables.append(pq.read_table(path, columns=list(columns)))
            except (ValueError, OSError, pa.ArrowException) as error:
                raise ValueError(f"{path}: {error}; delete it and fetch it again") from error
        self.table = pa.concat_tables(tables)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Row:
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


def read_rows(paths: Sequence[Path], columns: Sequence[str]) -> Rows:
    """Rows with these columns, of one JSONL file or of parquet files.

    Raises  ValueError naming the file, and the line of a JSONL file, where a row is not as it
            should be or there is none.
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


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """("<path>:<line>", value) of every line that is not blank.

    Raises  ValueError naming file and line of what is not JSON in UTF-8.
    """
    values = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    values.append((f"{path}:{number}", json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error})") from error
    return values
