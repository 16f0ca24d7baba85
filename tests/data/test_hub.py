"""Downloads from a server on loopback that speaks as much of the Hugging Face Hub as they need."""

import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import digests, shards
from nanochat.data.hub import HubDataset, download, download_shard

COMMIT = "0" * 40
HUB = HubDataset("someone/shards", "base_data", 3)


def shard(index: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {index}"]}), sink)
    return sink.getvalue()


@dataclass
class Hub:
    """What is served, and what was asked for."""

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    breaks: int = 0  # downloads to break off in the middle


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    state = Hub(files={f"shard_{i:05d}.parquet": shard(i) for i in range(3)})

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            name = self.path.rsplit("/", 1)[-1]
            data = state.files.get(name)
            if data is None:
                self.send_error(404)
                return
            sha = state.announced.get(name, hashlib.sha256(data).hexdigest())
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{sha}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("ETag", f'"{sha}"')
            self.end_headers()
            if body:
                state.downloads.append(name)
                if state.breaks > 0:
                    state.breaks -= 1
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


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
