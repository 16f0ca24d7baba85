"""Shards and splits: nothing lost, nothing shared, nothing damaged unnoticed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.data import digests, embedded, shards
from nanochat.data.documents import TextSource
from tests.support.shards import BYTES, break_row_group, documents, write, write_three


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    return write_three(tmp_path / "data")


def texts_of(folder: Path, split: str, skip_bad_shards: bool = False) -> list[str]:
    return list(shards.iter_documents(folder, split, skip_bad_shards))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 9, 40])
def test_train_and_validation_share_nothing(tmp_path: Path, count: int, rows: int) -> None:
    shards = [documents(100 * i, rows) for i in range(count)]
    folder = write(tmp_path / "data", shards, row_group=10)
    train, val = texts_of(folder, "train"), texts_of(folder, "val")
    assert train
    assert val
    assert train + val == [text for shard in shards for text in shard]


@pytest.mark.parametrize("world_size", [1, 3, 8, 17])
def test_blocks_are_cut_where_ranks_are_many(three_shards: Path, world_size: int) -> None:
    every = shards.row_blocks(three_shards, "train")
    parts = [shards.share(every, rank, world_size) for rank in range(world_size)]
    assert all(parts)
    texts = [text for part in parts for block in part for text in block.read()]
    assert sorted(texts) == sorted(documents(0, 17))


def test_a_block_knows_its_place_in_the_shard(three_shards: Path) -> None:
    whole = {path: documents_of(path) for path in shards.list_shards(three_shards)}
    every = shards.row_blocks(three_shards, "train")
    for block in [*every, *shards.share(every, 1, 12)]:
        start, stop = block.first_row + block.row_start, block.first_row + block.row_stop
        assert block.read() == whole[block.path][start:stop]


def documents_of(path: Path) -> list[str]:
    return pq.read_table(path)["text"].to_pylist()


def damage(path: Path, kind: str) -> None:
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "no rows":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    elif kind == "numbers":
        pq.write_table(pa.table({"text": [1, 2]}), path)
    else:
        pq.write_table(pa.table({"body": ["a"]}), path)


KINDS = ("cut", "empty file", "no rows", "no column", "numbers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_shard_is_named_or_skipped_aloud(
    three_shards: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage(three_shards / "shard_00001.parquet", kind)
    with pytest.raises(ValueError, match=r"shard_00001\.parquet.*--skip_bad_shards"):
        shards.row_blocks(three_shards, "train")
    assert texts_of(three_shards, "train", skip_bad_shards=True) == documents(0, 10)
    assert texts_of(three_shards, "val", skip_bad_shards=True) == documents(17, 8)
    assert capsys.readouterr().out.count("skipped: shard") == 2


@pytest.mark.parametrize("bad", [(2,), (1, 2), (0, 1)])
def test_splits_stay_apart_where_shards_are_bad(three_shards: Path, bad: tuple[int, ...]) -> None:
    shards = [documents(0, 10), documents(10, 7), documents(17, 8)]
    for index in bad:
        damage(three_shards / f"shard_{index:05d}.parquet", "cut")
    train, val = (texts_of(three_shards, s, skip_bad_shards=True) for s in ("train", "val"))
    assert train
    assert val
    left = [text for i, shard in enumerate(shards) if i not in bad for text in shard]
    assert train + val == left


def test_nothing_left_is_an_error(three_shards: Path) -> None:
    for path in shards.list_shards(three_shards):
        damage(path, "cut")
    with pytest.raises(ValueError, match=r"every shard in .* is bad"):
        shards.row_blocks(three_shards, "val", skip_bad_shards=True)


def test_a_broken_row_group_is_named_or_skipped_aloud(
    three_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_row_group(three_shards / "shard_00000.parquet", 1)
    with pytest.raises(ValueError, match=r"shard_00000\.parquet"):
        texts_of(three_shards, "train")
    left = documents(0, 3) + documents(6, 11)
    assert texts_of(three_shards, "train", skip_bad_shards=True) == left
    assert "skipped: shard" in capsys.readouterr().out


def test_rows_that_are_no_text_are_named(tmp_path: Path) -> None:
    latin = pa.array([b"a", "\u00e9".encode("latin-1")]).view(pa.string())
    for index, column in enumerate((pa.array(["a", None]), latin)):
        path = tmp_path / f"shard_{index:05d}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        (block,) = shards.shard_blocks(path)
        with pytest.raises(ValueError, match=f"{path.name}.*(has no text|UTF8)"):
            block.read()


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    """Other documents of the same lengths make files of the same names and sizes."""
    one = write(tmp_path / "one", [["abc", "def"], ["ghi"]])
    same = write(tmp_path / "same", [["abc", "def"], ["ghi"]])
    other = write(tmp_path / "other", [["abc", "dxf"], ["ghi"]])
    name = "shard_00000.parquet"
    assert (one / name).stat().st_size == (other / name).stat().st_size
    identities = [
        shards.identity(shards.row_blocks(folder, "train")) for folder in (one, same, other)
    ]
    assert identities[0] == identities[1] != identities[2]


def test_a_document_of_megabytes_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [["short", "x" * 5_000_000, "after"], ["val"]])
    read, number = [], 0
    source = TextSource(BYTES, shards.row_blocks(folder, "train"))
    while number < source.num_documents:
        documents, number = source.read(number)
        read += documents
    assert [len(tokens) for tokens in read] == [6, 5_000_001, 6]  # each after a BOS


def flipped(path: Path, bit: int) -> None:
    """Rot: one bit is another, size and times are as before."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("every", [101, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path, every: int) -> None:
    texts = [document + " of words" * 9 for document in documents(0, 12)]
    shards.write_shards(texts, tmp_path / "data", row_group=4)
    (path,) = shards.list_shards(tmp_path / "data")
    whole = texts_of(tmp_path / "data", "train") + texts_of(tmp_path / "data", "val")
    num_bits, found = 8 * path.stat().st_size, 0
    for bit in range(0, num_bits, every):
        flipped(path, bit)
        try:
            read = texts_of(tmp_path / "data", "train") + texts_of(tmp_path / "data", "val")
        except ValueError as error:
            message = str(error)
            found += 1
        else:
            message = path.name if read == whole else "other text"
        assert path.name in message, f"bit {bit}: {message}"
        flipped(path, bit)
    # all but the magic number at the beginning
    assert found >= (num_bits - 4 * 8) // every


def test_pages_of_our_shards_have_checksums_of_their_own(tmp_path: Path) -> None:
    """They travel with the file; the digests beside it may not."""
    shards.write_shards(documents(0, 12), tmp_path / "data", row_group=4)
    (path,) = shards.list_shards(tmp_path / "data")
    block = shards.shard_blocks(path)[1]
    assert block.digests is not None
    group = block.digests.groups[1]
    flipped(path, 8 * (group.start + group.length - 3))
    with pytest.raises(ValueError, match="row group 1 has changed on the disk"):
        block.read()
    with pytest.raises(ValueError, match=r"(?i)crc|checksum"):
        replace(block, digests=None).read()


def test_digests_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", [["abc", "def"], ["ghi"]])
    first = shards.row_blocks(folder, "train")
    computed = []
    compute = digests.compute
    monkeypatch.setattr(digests, "compute", lambda path: computed.append(path) or compute(path))
    assert shards.row_blocks(folder, "train") == first
    assert shards.shard_digest(first[0].path) == shards.shard_digest(first[0].path)
    assert computed == []
    # torn, or of another file: computed again
    (folder / ".shard_00000.parquet.digests.json").write_text('{"bytes": 3')
    assert shards.row_blocks(folder, "train") == first
    assert computed == [first[0].path]


def test_no_data_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m nanochat\.dataset"):
        shards.row_blocks(tmp_path, "train")
    with pytest.raises(ValueError, match="embedded, fineweb-edu, climbmix"):
        dataset.resolve_data_dir("fineweb", "", tmp_path)


def test_auto_is_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "collect", lambda: documents(0, 8))
    (tmp_path / "base_data").mkdir()  # a download that brought nothing
    folder = dataset.resolve_data_dir("auto", "", tmp_path)
    assert sorted(texts_of(folder, "train") + texts_of(folder, "val")) == sorted(documents(0, 8))
    write(tmp_path / "base_data_climbmix", [["a"], ["b"]])
    assert dataset.resolve_data_dir("auto", "", tmp_path).name == "base_data_climbmix"


def test_text_and_jsonl_are_imported_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.jsonl").write_text(
        json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"})
    )
    (source / "deep" / "b.txt").write_text("three")
    folder = dataset.resolve_data_dir("auto", str(source), tmp_path)
    texts = [t for s in ("train", "val") for t in shards.iter_documents(folder, s)]
    assert sorted(texts) == ["one", "three", "two"]
    assert dataset.resolve_data_dir("auto", str(source), tmp_path) == folder
    assert dataset.resolve_data_dir("auto", str(folder), tmp_path) == folder
    (source / "c.jsonl").write_text('{"body": 1}')
    with pytest.raises(ValueError, match=r"c\.jsonl"):
        dataset.resolve_data_dir("auto", str(source), tmp_path)
    left = [path.name for path in (tmp_path / "imported").iterdir() if path.is_dir()]
    assert left == [folder.name]


def test_embedded_is_real_text_without_duplicates() -> None:
    texts = embedded.collect(total_chars=2_000_000)
    assert texts == embedded.collect(total_chars=2_000_000)
    assert len(set(texts)) == len(texts) > 100
    assert all(1_000 <= len(text) <= 50_000 for text in texts)
    assert any("statement" in text for text in texts)
