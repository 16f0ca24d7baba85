"""Files of tasks: JSONL or parquet, local or from a server that speaks as the Hub does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.arc import ARC
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.sources import Source
from tests.support.hub import Hub, serving

DATA = Path(__file__).resolve().parent / "fixtures"


def to_parquet(jsonl: Path, names: list[str], folder: Path) -> None:
    """The rows of a JSONL file, dealt out over parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    per_file = -(-len(rows) // len(names))
    for i, name in enumerate(names):
        pq.write_table(pa.Table.from_pylist(rows[i * per_file : (i + 1) * per_file]), folder / name)


GOOD_LINE = b'{"question": "?", "answer": "#### 1"}\n'
SHARDS = [f"test-{i:05d}-of-00002.parquet" for i in range(2)]


@pytest.mark.parametrize("place", ["gsm8k/main", "gsm8k"])
@pytest.mark.parametrize("names", [["test.parquet"], SHARDS])
def test_parquet_is_as_good_as_jsonl(tmp_path: Path, place: str, names: list[str]) -> None:
    to_parquet(DATA / "gsm8k/main/test.jsonl", names, tmp_path / place)
    assert list(GSM8K("test", tmp_path)) == list(GSM8K("test", DATA))


@pytest.mark.parametrize(
    ("make", "folder"),
    [
        (lambda data: ARC("ARC-Easy", "test", data), "arc/ARC-Easy"),
        (lambda data: MMLU("test", data), "mmlu/all"),
        (lambda data: HumanEval("test", data), "humaneval"),
        (lambda data: SmolTalk("test", data), "smoltalk"),
    ],
)
def test_every_task_reads_parquet(tmp_path: Path, make: Any, folder: str) -> None:
    to_parquet(DATA / folder / "test.jsonl", ["test.parquet"], tmp_path / folder)
    assert list(make(tmp_path)) == list(make(DATA))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gsm8k/test\.jsonl is missing.*adding_a_task") as caught:
        GSM8K("test", tmp_path)
    assert "leave --task_data out" in str(caught.value)
    with pytest.raises(ValueError, match="no split 'val'; choose train, test"):
        GSM8K("val", DATA)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        GSM8K("test", tmp_path / "nowhere")
    to_parquet(DATA / "gsm8k/main/test.jsonl", SHARDS, tmp_path / "gsm8k")
    (tmp_path / "gsm8k" / SHARDS[0]).unlink()
    with pytest.raises(ValueError, match="is missing"):
        GSM8K("test", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("test.jsonl", GOOD_LINE + b'{"question": 1}\n', "jsonl:2: a row"),
        ("test.jsonl", GOOD_LINE + b"[1]\n", "jsonl:2: a row"),
        ("test.jsonl", GOOD_LINE + b'{"quest', "jsonl:2: not JSON"),
        ("test.jsonl", b"", "has no rows"),
        ("test.parquet", b"PAR1 cut short", "test.parquet: .* fetch it again"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        GSM8K("test", tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "gsm8k" / "test.parquet")
    with pytest.raises(ValueError, match=r"no column answer among \['question'\]"):
        GSM8K("test", tmp_path)


SUMS = Source("someone/sums", "5" * 40, ("sums/data", "sums"), ("train", "test"), ("question",))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    folder = tmp_path / "hub"
    to_parquet(DATA / "gsm8k/main/test.jsonl", SHARDS, folder / "data")
    to_parquet(DATA / "gsm8k/main/test.jsonl", ["test.parquet"], folder / "other")
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    with serving(Hub(SUMS.repository, SUMS.revision, files)) as server:
        yield server


def test_a_split_is_downloaded_once(hub: Hub, base_dir: Path) -> None:
    for _ in range(2):
        rows = SUMS.load("test", endpoint=hub.endpoint)
        assert [rows[i]["question"] for i in range(len(rows))] == [
            json.loads(line)["question"]
            for line in (DATA / "gsm8k/main/test.jsonl").read_text().splitlines()
        ]
    assert sorted(hub.downloads) == SHARDS
    for name in SHARDS:
        got = base_dir / "task_data" / "sums" / "data" / name
        assert got.read_bytes() == hub.files[f"data/{name}"]


def test_files_that_are_there_are_not_asked_for(hub: Hub, base_dir: Path) -> None:
    (base_dir / "task_data" / "sums").mkdir(parents=True)
    (base_dir / "task_data" / "sums" / "train.jsonl").write_text('{"question": "?"}')
    assert len(SUMS.load("train", endpoint=hub.endpoint)) == 1
    assert not hub.requests


def test_a_broken_download_goes_on(hub: Hub, base_dir: Path) -> None:
    SUMS.load("test", endpoint=hub.endpoint)
    (base_dir / "task_data" / "sums" / "data" / SHARDS[1]).unlink()
    hub.downloads.clear()
    assert len(SUMS.load("test", endpoint=hub.endpoint)) == 3
    assert hub.downloads == [SHARDS[1]]


def test_a_failed_download_says_what_to_do(
    hub: Hub, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = r"cannot download data/{}-\*\.parquet of someone/sums.*name a folder.*--task_data"
    with pytest.raises(ValueError, match=remedy.format("train")):
        SUMS.load("train", endpoint=hub.endpoint)
    other = Source("someone/gone", SUMS.revision, SUMS.places, SUMS.splits, SUMS.columns)
    with pytest.raises(ValueError, match=r"of someone/gone: ") as caught:
        other.load("test", endpoint=hub.endpoint)
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=remedy.format("test")):
        SUMS.load("test", endpoint=hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # a part that is there does not pass for the whole
    SUMS.load("test", endpoint=hub.endpoint)
    (base_dir / "task_data" / "sums" / "data" / SHARDS[1]).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=remedy.format("test")):
        SUMS.load("test", endpoint=hub.endpoint)
