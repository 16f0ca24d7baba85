"""Shards of pretraining text on the Hugging Face Hub: checked, several at a time."""

import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pyarrow as pa
from filelock import FileLock
from rich.progress import Progress

from nanochat.common import sha256_of
from nanochat.data import digests

SCRATCH = ".download"  # beside the shards, so that they appear by a rename


@dataclass(frozen=True)
class HubDataset:
    """A folder of shards on the Hugging Face Hub."""

    repository: str
    folder: str
    num_shards: int


HUB = {
    "fineweb-edu": HubDataset("karpathy/fineweb-edu-100b-shuffle", "base_data", 1823),
    "climbmix": HubDataset("karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6543),
}


def download_shard(
    dataset: HubDataset, index: int, folder: Path, endpoint: str | None = None
) -> Path:
    """Fetch one shard and check it against the hub's SHA-256.

    A connection that breaks is tried again a few times. The folder is there already.

    Raises  ValueError naming the file if its contents differ from what the hub announces.
    """
    name = f"shard_{index:05d}.parquet"
    if (folder / name).exists():
        return folder / name
    url = huggingface_hub.hf_hub_url(
        dataset.repository, name, repo_type="dataset", endpoint=endpoint
    )
    wanted = huggingface_hub.get_hf_file_metadata(url).etag
    path = Path(
        huggingface_hub.hf_hub_download(
            dataset.repository,
            name,
            repo_type="dataset",
            local_dir=folder / SCRATCH / name,
            endpoint=endpoint,
        )
    )
    announced = bool(wanted) and len(wanted) == 64  # large files are announced by SHA-256
    if announced and (found := sha256_of(path)) != wanted:
        path.unlink()
        raise ValueError(f"{name}: SHA-256 is {found}, the hub says {wanted}; try again")
    try:
        digests.record(folder / name, digests.compute(path, announced))
    except (pa.ArrowException, ValueError) as error:
        path.unlink()
        raise ValueError(f"{name} on the hub is not a parquet file of text: {error}") from error
    path.replace(folder / name)
    return folder / name


def download(
    dataset: HubDataset,
    num_files: int,
    num_workers: int,
    folder: Path,
    endpoint: str | None = None,
) -> None:
    """Fetch the first num_files shards (-1: all); the last of them serves for validation.

    Another process that fetches into the folder is waited for.

    Raises  ValueError for an impossible number; otherwise the first error of a download, without
            beginning further ones.
    """
    if num_files == 0 or num_files < -1 or num_workers < 1:
        raise ValueError(
            f"-n {num_files} -w {num_workers}: -n is -1 or at least 1, -w is at least 1"
        )
    count = dataset.num_shards if num_files == -1 else min(num_files, dataset.num_shards)
    folder.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(num_workers)
    with FileLock(folder.with_name(f".{folder.name}.lock")), Progress() as progress:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # of a download that was killed
        task = progress.add_task(f"{dataset.repository} -> {folder}", total=count)
        try:
            for future in as_completed(
                pool.submit(download_shard, dataset, i, folder, endpoint) for i in range(count)
            ):
                future.result()
                progress.advance(task)
        finally:
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
