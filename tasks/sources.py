"""Tasks made from the rows of a data set, and the files of those rows.

The files are in a local folder (--task_data), or downloaded from the Hugging Face Hub into
<base dir>/task_data. In either folder a split is one file, or shards named as on the Hub:

    gsm8k/main/test.jsonl    gsm8k/main/test.parquet    gsm8k/main/test-00000-of-00001.parquet

A download keeps the Hub's names, so both kinds of folder have the same layout.
"""

import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from filelock import FileLock

from nanochat.common import get_base_dir
from nanochat.text.chat_format import Conversation
from tasks.common import Task, shuffled
from tasks.rows import Row, Rows, read_rows

FOLDER = "task_data"
SHARD = re.compile(r".*-of-([0-9]+)\.parquet")


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from.

    repository, revision  on the Hugging Face Hub; the commit is pinned, so rows never change
    places                folders to look in, relative to the data folder, the preferred one first;
                          the part of that one after its first slash is the folder within the
                          repository: gsm8k/main holds what openai/gsm8k has in main/
    splits, columns       which must exist
    """

    repository: str
    revision: str
    places: tuple[str, ...]
    splits: tuple[str, ...]
    columns: tuple[str, ...]

    def load(self, split: str, task_data: Path | str = "", endpoint: str | None = None) -> Rows:
        """The rows of a split, in the order of the files.

        task_data  a folder to read from; empty downloads the split unless it is there already
        endpoint   address of the Hub; None is the library's default
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
        """The files of a split; an empty list if any of them is missing."""
        for place in (folder / name for name in self.places):
            for name in (f"{split}.jsonl", f"{split}.parquet"):
                if (place / name).is_file():
                    return [place / name]
            # a shard's name tells how many there are: an interrupted download is not complete
            shards = sorted(place.glob(f"{split}-*-of-*.parquet"))
            if shards and (match := SHARD.fullmatch(shards[0].name)):
                return shards if len(shards) == int(match[1]) else []
        return []

    def download(self, folder: Path, split: str, endpoint: str | None = None) -> None:
        """Fetch the shards of a split, resuming a partial download; safe with several ranks.

        Raises  ValueError naming repository and remedy where the Hub does not deliver.
        """
        name, _, inner = self.places[0].partition("/")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            # the rank that got the lock first has downloaded the files for the others
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
            # Offline, the library returns whatever is there without an error, so look for the
            # files instead of trusting it.
            if not self.find(folder, split):
                reason = str(cause).partition("\n")[0] if cause else "the Hub has no such files"
                raise ValueError(
                    f"cannot download {inner}/{split}-*.parquet of {self.repository}: {reason}; "
                    "try again to resume, or name a folder that has "
                    f"{self.places[-1]}/{split}.jsonl with --task_data"
                ) from cause


def data_folder(task_data: Path | str = "") -> Path:
    """The folder of task files; by default the one that downloads go to.

    Raises  ValueError if the given path is not a folder.
    """
    if not task_data:
        return get_base_dir() / FOLDER
    folder = Path(task_data).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"task_data {folder} is not a folder; name one, or leave it out to use the Hub"
        )
    return folder


class DatasetTask(Task):
    """A task with one conversation for each row of a data set, in a fixed shuffled order.

    A subclass sets `source` (or assigns it before calling this __init__) and turns a row into a
    conversation.

    split      one of source.splits
    task_data  local folder of files; empty downloads from the Hub
    Raises     ValueError for an unknown split or missing files.
    """

    source: Source

    def __init__(self, split: str, task_data: Path | str = "", **view: int | None) -> None:
        self.rows = self.source.load(split, task_data)
        self.order = shuffled(len(self.rows))
        super().__init__(len(self.order), **view)

    @abstractmethod
    def conversation(self, row: Row) -> Conversation:
        """The conversation that a row of the data set becomes."""

    def get_example(self, index: int) -> Conversation:
        return self.conversation(self.rows[int(self.order[index])])
