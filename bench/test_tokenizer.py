"""Training and encoding: rustbpe against rustbpe 0.1.0, tiktoken and Hugging Face tokenizers.

    pytest bench/test_tokenizer.py                        the standard library's source, a minute
    NANOCHAT_BASE_DIR=DIR pytest bench/test_tokenizer.py  200 MB of DIR/base_data, several minutes
    ... --out=bench/results/cpu                           and write tokenizer.json there

Each measurement is a process of its own, bench/tokenizer_worker.py. The ratios are of CPU seconds,
which hold on a busy machine too; wall time does not. "train under load" is about wall time: threads
against one thread, in turns within a process, while the machine is as idle as it was found, while a
busy process is pinned to each processor, and with four threads for each processor. No load should
make threads more than 1.2 times as slow as one. rustbpe 0.1.0 has the same module name; it
takes part if it is beside this one:

    pip install --target build/rustbpe-0.1.0 rustbpe==0.1.0
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.report import aligned
from bench.session import write_document
from nanochat.common import get_base_dir
from nanochat.report import table

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "build" / "rustbpe-0.1.0"
TRAIN = ("rustbpe", "rustbpe, 1 thread", "rustbpe 0.1.0")
TRAIN_HF = ("rustbpe, ties of tokenizers", "tokenizers")
LISTS = ("rustbpe", "rustbpe 0.1.0", "tiktoken", "tokenizers")
ARRAYS = ("rustbpe", "tiktoken")
GROUPS = {"train": TRAIN, "train as tokenizers": TRAIN_HF, "to lists": LISTS, "to numpy": ARRAYS}
LOADS = ("idle", "busy neighbours", "busy neighbours, 4 threads a core", "idle, 4 threads a core")
SPIN = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"
CASES = [(group, name) for group, names in GROUPS.items() for name in names]
REAL = {"train": 200_000_000, "encode": 40_000_000, "vocab_size": 65_536}  # bytes
SMALL = {"train": 3_000_000, "encode": 1_000_000, "vocab_size": 4_096}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """A file of the texts to train on and of the next ones, to encode."""
    shards = sorted((get_base_dir() / "base_data").glob("*.parquet"))
    if shards:
        sizes = REAL
        columns = (pq.read_table(shard, columns=["text"])["text"] for shard in shards)
        source = (text for column in columns for text in column.to_pylist())
    else:
        sizes = SMALL
        files = sorted(Path(str(json.__file__)).parent.parent.glob("*.py"))
        source = (path.read_text(encoding="utf-8") for path in files)
    texts: dict[str, list[str]] = {}
    for part in ("train", "encode"):
        texts[part], room = [], sizes[part]
        while room > 0:
            texts[part].append(next(source))
            room -= len(texts[part][-1].encode())
    path = tmp_path_factory.mktemp("texts") / "texts.json"
    path.write_text(json.dumps(texts))
    name = "base_data" if shards else "standard library"
    return {"path": str(path), "text": name, "vocab_size": sizes["vocab_size"]}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Everything measured."""
    return []


def measure(job: Row, group: str, name: str, **environment: str) -> Row:
    """The row of a worker process."""
    command = [sys.executable, "-m", "bench.tokenizer_worker", json.dumps([job, group, name])]
    environment = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@contextmanager
def busy_neighbours() -> Iterator[None]:
    """A process that never rests, on each processor that this one may use."""
    with ExitStack() as stack:
        for core in os.sched_getaffinity(0):
            neighbour = subprocess.Popen([sys.executable, "-c", SPIN, str(core)])
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        yield


@pytest.mark.parametrize(("group", "name"), CASES)
def test_contender(
    group: str, name: str, job: Row, rows: list[Row], benchmark: BenchmarkFixture
) -> None:
    published = "0.1.0" in name
    if published and not PUBLISHED.is_dir():
        pytest.skip(f"rustbpe 0.1.0 is not in {PUBLISHED}")
    environment = {"PYTHONPATH": str(PUBLISHED)} if published else {}
    row = benchmark.pedantic(lambda: measure(job, group, name, **environment))
    benchmark.extra_info.update(row)
    rows.append({"group": group, "name": name, **row})


@pytest.mark.parametrize("load", LOADS)
def test_load(load: str, job: Row, rows: list[Row], benchmark: BenchmarkFixture) -> None:
    with ExitStack() as stack:
        if "busy" in load:
            stack.enter_context(busy_neighbours())
        row = benchmark.pedantic(lambda: measure(job, "train under load", load))
    benchmark.extra_info.update(row)
    rows.append({"group": "train under load", "name": load, **row})


def test_results_agree(
    job: Row, rows: list[Row], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tokens, the same ids; then the table of who needs how much CPU time."""
    first: dict[str, Row] = {}
    for row in rows:
        row["cpu_ratio"] = row["cpu_seconds"] / first.setdefault(row["group"], row)["cpu_seconds"]
    columns = {
        "": "group", "contender": "name", "MB": "megabytes", "CPU s": "cpu_seconds",
        "s": "wall_seconds", "x ours": "cpu_ratio", "MB more memory": "peak_megabytes",
        "x the time of 1 thread": "wall_ratio",
    }  # fmt: skip
    lines = [[row.get(name, "") for name in columns.values()] for row in rows]
    known = {"text": job["text"], "vocab_size": job["vocab_size"]}
    write_document(request.config, "tokenizer.json", {**known, "rows": rows})
    with capsys.disabled():
        print(f"\n{job['text']}, vocabulary {job['vocab_size']:,}")
        print(aligned(table(tuple(columns), lines)))
    for row in rows:
        assert row["digest"] == first[row["group"]]["digest"], row
