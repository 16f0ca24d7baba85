"""Shards, splits and batches: nothing lost, nothing shared, resumed exactly."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataset, embedded_corpus
from nanochat.dataloader import CUDAPrefetcher, DataLoader, tokenizing_distributed_data_loader
from nanochat.tokenizer import TiktokenTokenizer

BYTES = TiktokenTokenizer.from_ranks({bytes([i]): i for i in range(256)}, r"(?s:.)")
BOS = 256


def write(folder: Path, shards: list[list[str]], row_group: int = 3) -> Path:
    folder.mkdir()
    for index, texts in enumerate(shards):
        path = folder / f"shard_{index:05d}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group)
    return folder


def documents(start: int, count: int) -> list[str]:
    return [f"<{i}>" + "x" * (i * 7 % 23) for i in range(start, start + count)]


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    return write(tmp_path / "data", [documents(0, 10), documents(10, 7), documents(17, 8)])


def loader(folder: Path, split: str = "train", **options: Any) -> DataLoader:
    sizes = {"batch_size": 2, "sequence_len": 16} | options
    return DataLoader(BYTES, folder, split, **sizes)


def take(batches: DataLoader, count: int) -> list[tuple[list, list]]:
    taken = [(b.inputs.tolist(), b.targets.tolist()) for b in itertools.islice(batches, count)]
    batches.close()
    return taken


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 9, 40])
def test_train_and_validation_share_nothing(tmp_path: Path, count: int, rows: int) -> None:
    shards = [documents(100 * i, rows) for i in range(count)]
    folder = write(tmp_path / "data", shards, row_group=10)
    train, val = (list(dataset.iter_documents(folder, split)) for split in ("train", "val"))
    assert train
    assert val
    assert sorted(train + val) == sorted(text for shard in shards for text in shard)


def test_stream_is_the_text(three_shards: Path) -> None:
    tokens = [t for text in documents(0, 17) for t in (BOS, *text.encode())]
    batches = take(loader(three_shards), 12)
    flat = [t for inputs, _ in batches for row in inputs for t in row]
    assert flat == (tokens * 3)[: len(flat)]
    assert len(flat) > len(tokens)  # beyond the end of the data
    for inputs, targets in batches:
        ahead = list(itertools.chain.from_iterable(targets))
        assert list(itertools.chain.from_iterable(inputs))[1:] == ahead[:-1]


def test_ranks_share_the_documents_out(three_shards: Path) -> None:
    seen = []
    for rank in range(2):
        # more than one pass: the set of documents is what counts
        batches = take(loader(three_shards, rank=rank, world_size=2), 20)
        flat = bytes(t if t < 256 else 0 for inputs, _ in batches for row in inputs for t in row)
        seen.append({part for part in flat.split(b"\0")[1:-1] if part})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {text.encode() for text in documents(0, 17)}


@pytest.mark.parametrize("packing", ["stream", "bestfit"])
@pytest.mark.parametrize("rank", [0, 1])
def test_resume_is_exact(
    three_shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packing: str, rank: int
) -> None:
    monkeypatch.setattr("nanochat.dataloader.BESTFIT_DOCUMENTS", 5)
    monkeypatch.setattr("nanochat.dataloader.DOCUMENTS_AT_ONCE", 2)
    options = {"packing": packing, "rank": rank, "world_size": 2}
    whole = loader(three_shards, **options)
    batches = list(itertools.islice(whole, 30))
    whole.close()
    for at in range(0, 24, 3):
        torch.save(batches[at].state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = loader(three_shards, state=state, **options)
        for want in batches[at + 1 : at + 6]:
            got = next(again)
            assert torch.equal(got.inputs, want.inputs)
            assert torch.equal(got.targets, want.targets)
        again.close()


@pytest.mark.parametrize("world_size", [1, 3, 8, 17])
def test_blocks_are_cut_where_ranks_are_many(three_shards: Path, world_size: int) -> None:
    every = dataset.row_blocks(three_shards, "train")
    parts = [dataset.share(every, rank, world_size) for rank in range(world_size)]
    assert all(parts)
    texts = [text for part in parts for block in part for text in block.read()]
    assert sorted(texts) == sorted(documents(0, 17))


def test_bestfit_rows_begin_with_a_document(
    three_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.dataloader.BESTFIT_DOCUMENTS", 6)
    for inputs, targets in take(loader(three_shards, packing="bestfit"), 10):
        assert [row[0] for row in inputs] == [BOS, BOS]
        assert [row[1:] for row in inputs] == [row[:-1] for row in targets]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "greedy"}, "stream or bestfit"),
        ({"world_size": 50}, "fewer than the 50 ranks"),
        ({"split": "test"}, "choose train or val"),
    ],
)
def test_bad_options_are_refused(three_shards: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(three_shards, **options)


def test_a_state_of_another_run_is_refused(three_shards: Path) -> None:
    first = loader(three_shards)
    state = next(first).state
    first.close()
    with pytest.raises(ValueError, match="packing = stream"):
        loader(three_shards, packing="bestfit", state=state)
    with pytest.raises(ValueError, match="world_size = 1"):
        loader(three_shards, world_size=2, state=state)


def test_a_state_of_other_data_is_refused(three_shards: Path, tmp_path: Path) -> None:
    """As many documents in as many shards, but not the same ones."""
    first = loader(three_shards)
    state = next(first).state
    first.close()
    shards = [documents(100, 10), documents(10, 7), documents(17, 8)]
    with pytest.raises(ValueError, match=r"saved with data = .*resume with the data"):
        loader(write(tmp_path / "other", shards), state=state)


def damage(path: Path, kind: str) -> None:
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "no rows":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        pq.write_table(pa.table({"body": ["a"]}), path)


@pytest.mark.parametrize("kind", ["cut", "empty file", "no rows", "no column"])
def test_a_bad_shard_is_named_or_skipped_aloud(
    three_shards: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    bad = three_shards / "shard_00001.parquet"
    damage(bad, kind)
    with pytest.raises(ValueError, match=r"shard_00001\.parquet"):
        loader(three_shards)
    blocks = dataset.row_blocks(three_shards, "train", skip_bad_shards=True)
    assert {block.path.name for block in blocks} == {"shard_00000.parquet"}
    assert "shard_00001.parquet" in capsys.readouterr().out


def test_a_row_without_text_reaches_the_consumer(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", None, "b"]}), folder / "shard_00000.parquet")
    pq.write_table(pa.table({"text": ["c"]}), folder / "shard_00001.parquet")
    batches = loader(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match="has no text"):
            next(batches)
    batches.close()


def test_no_data_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m nanochat\.dataset"):
        dataset.row_blocks(tmp_path, "train")
    with pytest.raises(ValueError, match="embedded, fineweb-edu, climbmix"):
        dataset.resolve_data_dir("fineweb", "", tmp_path)


def test_text_and_jsonl_are_imported_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.jsonl").write_text(
        json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"})
    )
    (source / "deep" / "b.txt").write_text("three")
    folder = dataset.resolve_data_dir("auto", str(source), tmp_path)
    texts = [t for s in ("train", "val") for t in dataset.iter_documents(folder, s)]
    assert sorted(texts) == ["one", "three", "two"]
    assert dataset.resolve_data_dir("auto", str(source), tmp_path) == folder
    assert dataset.resolve_data_dir("auto", str(folder), tmp_path) == folder
    (source / "c.jsonl").write_text('{"body": 1}')
    with pytest.raises(ValueError, match=r"c\.jsonl"):
        dataset.resolve_data_dir("auto", str(source), tmp_path)
    left = [path.name for path in (tmp_path / "imported").iterdir() if path.is_dir()]
    assert left == [folder.name]


def test_prefetcher_hands_on_what_the_loader_gives(three_shards: Path) -> None:
    plain = take(loader(three_shards), 3)
    prefetched = CUDAPrefetcher(loader(three_shards), torch.device("cpu"))
    got = [(b.inputs.tolist(), b.targets.tolist()) for b in itertools.islice(prefetched, 3)]
    prefetched.close()
    assert got == plain
    pairs = tokenizing_distributed_data_loader(BYTES, three_shards, 2, 16, "train")
    assert [(x.tolist(), y.tolist()) for x, y in itertools.islice(pairs, 3)] == plain


def test_embedded_corpus_is_real_text_without_duplicates() -> None:
    texts = embedded_corpus.collect(total_chars=2_000_000)
    assert texts == embedded_corpus.collect(total_chars=2_000_000)
    assert len(set(texts)) == len(texts) > 100
    assert all(1_000 <= len(text) <= 50_000 for text in texts)
    assert any("statement" in text for text in texts)
