"""Token shards: the same batches as from text, for any number of ranks; damage is noticed."""

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.data import shards, token_cache
from nanochat.data.dataloader import DataLoader
from nanochat.data.token_cache import CachedSource, TokenShard
from nanochat.text.tokenizer import TiktokenTokenizer
from tests.support.shards import (
    BYTES,
    break_row_group,
    documents,
    loader,
    rows,
    take,
    write,
    write_three,
)


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    return write_three(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def shards_of(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.rglob("meta.json"))


@pytest.mark.parametrize("packing", ["stream", "bestfit"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_are_those_from_text(
    three_shards: Path, cache: Path, packing: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.data.dataloader.BESTFIT_DOCUMENTS", 5)
    options = {"split": split, "packing": packing}
    cached = take(loader(three_shards, **options, token_cache=cache), 20)
    assert cached == take(loader(three_shards, **options), 20)
    assert len(shards_of(cache)) == {"train": 2, "val": 1}[split]


@pytest.mark.parametrize("row_group", [2, 100])
def test_splits_of_one_shard_share_its_tokens(tmp_path: Path, cache: Path, row_group: int) -> None:
    folder = write(tmp_path / "data", [documents(0, 12)], row_group)
    for split in ("train", "val"):
        cached = take(loader(folder, split, token_cache=cache), 4)
        assert cached == take(loader(folder, split), 4)
    assert len(shards_of(cache)) == 1


@pytest.mark.parametrize("packing", ["stream", "bestfit"])
def test_any_number_of_ranks_goes_on_where_others_stopped(
    three_shards: Path, cache: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.data.dataloader.BESTFIT_DOCUMENTS", 5)
    options: dict[str, Any] = {"packing": packing, "token_cache": cache}
    whole = rows(take(loader(three_shards, **options), 24))

    def ranks(world_size: int, state: dict | None = None) -> list[DataLoader]:
        return [
            loader(three_shards, rank=rank, world_size=world_size, state=state, **options)
            for rank in range(world_size)
        ]

    found, state = [], None
    for world_size, rounds in ((2, 3), (3, 2), (1, 4), (8, 1)):
        loaders = ranks(world_size, state)
        for _ in range(rounds):
            batches = [next(one) for one in loaders]
            found += [(b.inputs.tolist(), b.targets.tolist()) for b in batches]
            assert len({str(batch.state) for batch in batches}) == 1
        state = batches[0].state
    assert rows(found) == whole


def test_shards_are_written_once_by_many(
    three_shards: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = shards.row_blocks(three_shards, "train")
    start = threading.Barrier(4)
    sources = []

    def make() -> None:
        start.wait()
        sources.append(CachedSource(BYTES, blocks, cache))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().out.count("tokenizing") == 2
    assert len(sources) == 4
    assert [len(source.read(0)[0]) for source in sources] == [3] * 4


def test_one_waits_for_a_shard_that_another_is_at(
    three_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And meanwhile writes the others."""
    blocks = shards.row_blocks(three_shards, "train")
    write_shard = token_cache._write
    begun, go = threading.Event(), threading.Event()
    written = []

    def slow(tokenizer: Any, path: Path, target: Path, threads: int) -> None:
        if path.name == "shard_00000.parquet":
            begun.set()
            assert go.wait(timeout=30)
        write_shard(tokenizer, path, target, threads)
        written.append(path.name)
        if path.name == "shard_00001.parquet":
            go.set()

    monkeypatch.setattr(token_cache, "_write", slow)
    first = threading.Thread(target=CachedSource, args=(BYTES, blocks, cache))
    first.start()
    assert begun.wait(timeout=30)
    source = CachedSource(BYTES, blocks, cache)
    first.join()
    assert written == ["shard_00001.parquet", "shard_00000.parquet"]
    assert len(source.read(0)[0]) == 3


def test_what_a_killed_process_left_is_no_shard(three_shards: Path, cache: Path) -> None:
    take(loader(three_shards, token_cache=cache), 1)
    shard = shards_of(cache)[0]
    shard.rename(shard.with_name(f".{shard.name}.tmp"))
    shard.with_name(f".{shard.name}.lock").touch()
    take(loader(three_shards, token_cache=cache), 1)
    assert shard.is_dir()
    assert not list(cache.rglob("*.tmp"))


def test_other_text_and_other_tokenizers_have_shards_of_their_own(
    three_shards: Path, cache: Path
) -> None:
    take(loader(three_shards, token_cache=cache), 1)
    first = set(shards_of(cache))
    assert len(first) == 2
    more = TiktokenTokenizer.from_ranks(
        {bytes([i]): i for i in range(256)} | {b"xx": 256}, r"(?s:.)"
    )
    take(loader(three_shards, tokenizer=more, token_cache=cache), 1)
    assert len(shards_of(cache)) == 4
    shutil.rmtree(three_shards)
    other = write(three_shards, [documents(50, 10), documents(10, 7), documents(17, 8)])
    cached = take(loader(other, token_cache=cache), 3)
    assert cached == take(loader(other), 3)
    assert len(shards_of(cache)) == 5


@pytest.mark.parametrize("kind", ["byte", "cut", "offsets", "no tokens", "no meta", "meta"])
def test_damage_is_named_and_deleting_the_shard_mends_it(
    three_shards: Path, cache: Path, kind: str
) -> None:
    whole = take(loader(three_shards, token_cache=cache), 4)
    shard = shards_of(cache)[0]
    tokens, offsets, meta = (shard / name for name in ("tokens.bin", "offsets.npy", "meta.json"))
    data = bytearray(tokens.read_bytes())
    if kind == "byte":
        data[3] ^= 1
        tokens.write_bytes(data)
    elif kind == "cut":
        tokens.write_bytes(data[:-2])
    elif kind == "offsets":
        np.save(offsets, np.load(offsets) + 1)
    elif kind == "no tokens":
        tokens.unlink()
    elif kind == "no meta":
        meta.unlink()
    else:
        meta.write_text(meta.read_text().replace("uint16", "object"))
    with pytest.raises(ValueError, match=f"{shard.name} is damaged .* delete it"):
        next(loader(three_shards, token_cache=cache))
    shutil.rmtree(shard)
    assert take(loader(three_shards, token_cache=cache), 4) == whole


def test_a_bad_text_shard_leaves_nothing_behind(three_shards: Path, cache: Path) -> None:
    break_row_group(three_shards / "shard_00000.parquet", 1)
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"shards whole: .*shard_00000\.parquet"):
            loader(three_shards, token_cache=cache, skip_bad_shards=skip)
    assert shards_of(cache) == []
    assert not list(cache.rglob("*.tmp"))


def test_ids_beyond_two_bytes_are_kept(
    three_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(TiktokenTokenizer):
        def encode_to_numpy(self, *args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
            tokens, offsets = super().encode_to_numpy(*args, **options)
            return tokens.astype(np.uint32) + 2**16, offsets

    wide = loader(three_shards, tokenizer=Wide(BYTES.encoding), token_cache=cache)
    narrow = take(loader(three_shards), 3)
    want = list(itertools.chain.from_iterable(rows(narrow)))
    assert list(itertools.chain.from_iterable(rows(take(wide, 3)))) == [t + 2**16 for t in want]
    assert TokenShard.open(shards_of(cache)[0]).tokens.dtype == np.uint32
