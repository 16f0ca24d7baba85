"""What tests of the pipeline share: a toy base directory, and commands run inside this process.

A command in a process of its own spends two seconds on imports; run here it spends none, and an
error arrives as the exception it is.
"""

import contextlib
import gc
import io
import itertools
import json
import os
import random
import runpy
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat import hardware
from nanochat.data.dataloader import CUDAPrefetcher
from nanochat.gpt import GPT
from nanochat.kernels.registry import REGISTRY
from nanochat.locks import OwnedLock
from nanochat.text.tokenizer import RustBPETokenizer
from nanochat.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the quick brown fox jumps over lazy dogs while five wizards brew strong tea"
WORDS = TEXT.split()
VOCAB_SIZE = 290
SEQUENCE_LEN = 32
ROWS = 2  # of a micro-batch, and documents of a row group
TINY = (
    "--device=cpu",
    "--depth=2",
    f"--max_seq_len={SEQUENCE_LEN}",
    f"--device_batch_size={ROWS}",
    f"--total_batch_size={2 * ROWS * SEQUENCE_LEN}",
    "--eval_tokens=128",
    "--sample_every=-1",
)


def torchrun(ranks: int, restarts: int = 0) -> list[str]:
    """The words that start a script on several ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]


def rank_of(torchrun: int, rank: int) -> psutil.Process | None:
    """The process of a rank that torchrun, a process id, has started; None while there is none."""
    for child in psutil.Process(torchrun).children():
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child
    return None


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 100 words, the same on every machine."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=100)) + "." for _ in range(count)]


def tokenizer() -> RustBPETokenizer:
    """Trained on the toy text: 25 merges."""
    return RustBPETokenizer.train_from_iterator(sentences(40), VOCAB_SIZE)


def rows_of_tokens(count: int, seed: int = 1) -> list[str]:
    """Texts that fill one row each: SEQUENCE_LEN tokens, BOS among them."""
    encoder, draw = tokenizer(), random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        text = " ".join(draw.choices(WORDS, k=draw.randint(4, 16)))
        if len(encoder.encode(text)) == SEQUENCE_LEN - 1:
            found.append(text)
    return found


def write_shard(folder: Path, index: int, texts: list[str], row_group: int = ROWS) -> Path:
    """One parquet file of the data set's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard_{index:05d}.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group)
    return path


def make_base_dir(base_dir: Path) -> Path:
    """A base directory with a tokenizer and twelve row groups of one micro-batch each in text/."""
    tokenizer().save(base_dir / "tokenizer")
    write_shard(base_dir / "text", 0, rows_of_tokens(12 * ROWS))
    write_shard(base_dir / "text", 1, rows_of_tokens(2 * ROWS, seed=2))
    return base_dir


def run_here(base_dir: Path, command: str, *more: str, **environment: str) -> str:
    """What `python ...` prints, run as __main__ in this process; SystemExit(0) is a normal end."""
    program, *words = [*shlex.split(command), *more]
    assert program == "python", program
    if words[0] == "-m":
        path = ROOT / (words[1].replace(".", "/") + ".py")
        arguments = words[2:]
    else:
        path = ROOT / words[0]
        arguments = words[1:]
    output = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"NANOCHAT_BASE_DIR": str(base_dir), **environment}),
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        process_restored(),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as leaving:
            if leaving.code:
                raise SystemExit(f"{leaving.code}: {output.getvalue()}") from leaving
    return output.getvalue()


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Put back what a script changes in its process; close what an error leaves open."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    selected = {op: op.selected for op in REGISTRY.values()}
    left_open: list[Tracker | CUDAPrefetcher | OwnedLock] = []

    def noting(closable: type[Tracker] | type[CUDAPrefetcher] | type[OwnedLock]) -> Any:
        build = closable.__init__

        def build_and_note(self: Any, *arguments: Any, **options: Any) -> None:
            build(self, *arguments, **options)
            left_open.append(self)

        return mock.patch.object(closable, "__init__", build_and_note)

    threads, random_state = torch.get_num_threads(), random.getstate()
    try:
        with (
            noting(Tracker),
            noting(CUDAPrefetcher),
            noting(OwnedLock),
            # what the device reaches is another test's subject, and takes seconds
            mock.patch.object(hardware, "measure_gemm", return_value=1e11),
            mock.patch.object(hardware, "measure_copy", return_value=1e10),
            warnings.catch_warnings(),
            torch.random.fork_rng(),
        ):
            torch.set_num_threads(1)
            yield
    finally:
        for each in left_open:
            each.close()
        for op, name in selected.items():
            op.use(name)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        random.setstate(random_state)
        gc.unfreeze()
        gc.enable()


@contextlib.contextmanager
def training_losses(spoil: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Send the losses that are trained on through `spoil`, with the number of the forward pass."""
    forward, passes = GPT.forward, itertools.count()

    def spoiled(model: GPT, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = forward(model, *arguments, **options)
        return spoil(next(passes), loss) if torch.is_grad_enabled() else loss

    with mock.patch.object(GPT, "forward", spoiled):
        yield


def records(run_dir: Path, kind: str, stage: str = "base") -> list[dict]:
    """Records of a kind and stage in the metrics.jsonl of a run's folder."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    every = map(json.loads, lines)
    return [record for record in every if (record["kind"], record["stage"]) == (kind, stage)]


def losses(run_dir: Path) -> list[float]:
    """Training loss of each step of base training."""
    return [record["loss"] for record in records(run_dir, "train")]
