"""Downloads from a server on loopback that speaks as much of the Hugging Face Hub as they need."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import digests, shards
from nanochat.data.hub import HubDataset, download, download_shard
from tests.support.hub import Hub, serving

HUB = HubDataset("someone/shards", "base_data", 3)


def shard(index: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {index}"]}), sink)
    return sink.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    files = {f"shard_{i:05d}.parquet": shard(i) for i in range(3)}
    with serving(Hub(HUB.repository, "main", files)) as server:
        yield server


def test_shards_arrive_once(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "base_data"
    download(HUB, -1, 2, folder, hub.endpoint)
    assert sorted(p.name for p in folder.glob("[!.]*")) == sorted(hub.files)
    assert (folder / "shard_00002.parquet").read_bytes() == hub.files["shard_00002.parquet"]
    download(HUB, 2, 2, folder, hub.endpoint)
    assert sorted(hub.downloads) == sorted(hub.files)


def test_the_hubs_checksum_is_kept_and_holds_later(hub: Hub, tmp_path: Path) -> None:
    path = download_shard(HUB, 1, tmp_path, hub.endpoint)
    known = digests.digests_of(path)
    assert known.downloaded
    assert known.sha256 == hashlib.sha256(hub.files[path.name]).hexdigest()
    path.touch()  # another time, the same content
    assert digests.digests_of(path).sha256 == known.sha256
    assert digests.digests_of(path).downloaded
    path.write_bytes(shard(2))
    with pytest.raises(ValueError, match=rf"{path.name}.*not that of the download.*fetch it again"):
        shards.shard_blocks(path)


def test_a_wrong_checksum_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.announced["shard_00000.parquet"] = "ab" * 32
    with pytest.raises(ValueError, match="SHA-256"):
        download_shard(HUB, 0, tmp_path, hub.endpoint)
    assert not (tmp_path / "shard_00000.parquet").exists()


@pytest.mark.parametrize(("number", "workers"), [(0, 1), (-2, 1), (1, 0)])
def test_impossible_numbers_are_refused(tmp_path: Path, number: int, workers: int) -> None:
    with pytest.raises(ValueError, match="-n is -1 or at least 1"):
        download(HUB, number, workers, tmp_path)


def test_a_broken_connection_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = 1
    path = download_shard(HUB, 1, tmp_path, hub.endpoint)
    assert path.read_bytes() == hub.files[path.name]
    assert len(hub.downloads) == 2


def test_what_is_no_parquet_file_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.files["shard_00000.parquet"] = b"<html>"
    with pytest.raises(ValueError, match=r"shard_00000\.parquet on the hub is not a parquet"):
        download_shard(HUB, 0, tmp_path, hub.endpoint)
    assert not (tmp_path / "shard_00000.parquet").exists()


def test_an_error_begins_no_further_download_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.announced["shard_00000.parquet"] = "ab" * 32
    names = [f"shard_{i:05d}.parquet" for i in range(40)]
    hub.files = dict.fromkeys(names, shard(0))
    folder = tmp_path / "base_data"
    killed = folder / ".download" / "shard_00039.parquet" / "part"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"of a download that was killed")
    many = HubDataset(HUB.repository, HUB.folder, len(names))
    with pytest.raises(ValueError, match="SHA-256"):
        download(many, -1, 1, folder, hub.endpoint)
    assert len(hub.downloads) < 10
    left = {path.name for path in folder.glob("[!.]*")}
    assert not (folder / ".download").exists()
    assert left == set(hub.downloads) - {"shard_00000.parquet"}
