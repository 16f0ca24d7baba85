"""Train a tokenizer.

python -m scripts.tok_train --vocab_size=65536 --max_chars=2000000000
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.progress import Progress

from nanochat import command, configurator
from nanochat.common import get_base_dir, print0, setup_training
from nanochat.data.shards import iter_documents
from nanochat.dataset import DATASETS, resolve_data_dir
from nanochat.locks import OwnedLock
from nanochat.settings import Choices, Count
from nanochat.text.tokenizer import RustBPETokenizer
from nanochat.text.tokenizer_base import check_vocab_size
from nanochat.tracking import Tracker


@dataclass(frozen=True)
class Settings:
    """Train a byte-level BPE tokenizer on the training split."""

    vocab_size: Count = 65_536  # tokens, the nine special ones among them
    max_chars: Count = 10_000_000_000  # characters to learn from at the most
    doc_cap: Count = 10_000  # characters taken of each document at the most
    dataset: Annotated[str, Choices(DATASETS)] = "auto"  # auto: what is downloaded, else embedded
    data_dir: str = ""  # folder of parquet, JSONL or text files instead of a dataset
    output_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    skip_bad_shards: bool = False  # leave out unreadable shards instead of stopping


def main() -> None:
    settings = configurator.load(Settings)
    check_vocab_size(settings.vocab_size)
    runtime = setup_training("cpu")
    base_dir = get_base_dir()
    data_dir = resolve_data_dir(settings.dataset, settings.data_dir, base_dir)
    output_dir = Path(settings.output_dir or base_dir / "tokenizer")
    # both fail early where they cannot write
    lock = OwnedLock(output_dir / ".run", "wait for it, or use another --output_dir")
    tracker = Tracker(output_dir, runtime, "tok_train", settings)
    started = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task(f"characters of {data_dir}", total=None)

        def texts() -> Iterator[str]:
            chars = 0
            for document in iter_documents(data_dir, "train", settings.skip_bad_shards):
                text = document[: min(settings.doc_cap, settings.max_chars - chars)]
                chars += len(text)
                progress.update(task, completed=chars)
                yield text
                if chars >= settings.max_chars:
                    return

        tokenizer = RustBPETokenizer.train_from_iterator(texts(), settings.vocab_size)
        chars = int(progress.tasks[0].completed)
    tokenizer.save(output_dir)
    seconds = time.perf_counter() - started
    tracker.log("end", 0, wall_seconds=seconds, chars=chars, vocab_size=tokenizer.get_vocab_size())
    tracker.close()
    lock.close()
    print0(f"{tokenizer.get_vocab_size():,} tokens from {chars:,} characters in {seconds:.1f} s "
           f"-> {output_dir}")  # fmt: skip


if __name__ == "__main__":
    command.run(main)
