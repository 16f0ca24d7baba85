"""The files of CORE: where they are, how they get there, what is in them.

<bundle>/core.yaml           tasks: label, dataset_uri, num_fewshot, icl_task_type, delimiter
<bundle>/eval_meta_data.csv  accuracy of guessing, in percent
<bundle>/eval_data/...       one JSON object a line
"""

import csv
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from filelock import FileLock
from rich.progress import Progress

from nanochat.common import replace_file, sha256_of

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
FOLDER = "eval_bundle"
CHUNK = 2**20
TIMEOUT_S = 60


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle."""

    label: str
    kind: str
    num_fewshot: int
    delimiter: str
    guessing_percent: float
    path: Path

    def load(self) -> list[dict[str, Any]]:
        """All examples, in the order of the file.

        Raises  ValueError naming file and line where one cannot be read.
        """
        items = []
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    items.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.path}:{number}: not JSON ({error})") from error
        if not items:
            raise ValueError(f"{self.path} holds no examples")
        return items


def load_tasks(bundle: Path, only: str = "") -> list[CoreTask]:
    """The tasks of a bundle, all or those of a comma-separated list of labels.

    Raises  ValueError for a folder without a bundle, a missing file or an unknown label.
    """
    config_path, meta_path = bundle / "core.yaml", bundle / "eval_meta_data.csv"
    for path in (config_path, meta_path):
        if not path.is_file():
            raise ValueError(
                f"{bundle} holds no {path.name}; --bundle_dir must name the unpacked evaluation "
                "bundle, or leave it out to download one"
            )
    with meta_path.open(encoding="utf-8", newline="") as file:
        guessing = {r["Eval Task"]: float(r["Random baseline"]) for r in csv.DictReader(file)}
    tasks = []
    for entry in yaml.safe_load(config_path.read_text(encoding="utf-8"))["icl_tasks"]:
        path = bundle / "eval_data" / entry["dataset_uri"]
        if not path.is_file():
            raise ValueError(f"{path} is missing: the bundle is incomplete; download it again")
        tasks.append(
            CoreTask(
                entry["label"],
                entry["icl_task_type"],
                entry["num_fewshot"][0],
                entry.get("continuation_delimiter", " "),
                guessing[entry["label"]],
                path,
            )
        )
    wanted = [label.strip() for label in only.split(",") if label.strip()]
    known = {task.label: task for task in tasks}
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"CORE has no task {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[label] for label in wanted] if wanted else tasks


def get_bundle(base_dir: Path, url: str = URL, sha256: str = "") -> Path:
    """The bundle below base_dir, downloaded first where it is not there; safe with several ranks.

    sha256  of the archive. Empty: that of the first download, which is written down and holds from
            then on: scores of two downloads are scores of the same questions.
    Raises  ValueError naming the address where it cannot be fetched or is not the bundle, or both
            digests where it is another one.
    """
    folder, note = base_dir / FOLDER, base_dir / f"{FOLDER}.sha256"
    with FileLock(base_dir / f"{FOLDER}.lock"):
        there = (folder / "core.yaml").is_file()
        known = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
        wanted = sha256.lower() or known
        if there and known != wanted:
            raise ValueError(
                f"{folder} is of an archive of SHA-256 {known or '(unknown)'}, not {wanted}; move "
                "it away to download another, or leave the SHA-256 out"
            )
        if not there:
            archive = base_dir / f"{FOLDER}.zip.part"
            _fetch(url, archive)
            found = sha256_of(archive)
            if wanted and found != wanted:
                archive.unlink()
                raise ValueError(
                    f"{url} has the SHA-256 {found}, not {wanted}"
                    + (f" as {note} says" if not sha256 else "")
                    + "; it was removed: run again, or delete the note if the file was replaced"
                )
            _unpack(archive, folder)
            replace_file(note, found + "\n")
            archive.unlink()
    return folder


def _fetch(url: str, part: Path) -> None:
    """Download into `part`, resuming where an interrupted download stopped."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                return  # the file is complete
            response.raise_for_status()
            resumed = response.status_code == requests.codes.partial_content
            size = int(response.headers.get("Content-Length", 0))
            with part.open("ab" if resumed else "wb") as file, Progress() as progress:
                task = progress.add_task(url, total=size or None)
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
            if size and part.stat().st_size != size + (have if resumed else 0):
                raise requests.ConnectionError("the download ended early")
    except requests.RequestException as error:
        raise ValueError(
            f"cannot download {url} ({error}); run again to resume, or give --bundle_dir"
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    """Put the archive's one folder in place as a whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(temporary)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise ValueError(f"{archive} was not an archive and has been removed; run again") from error
    inner = temporary / FOLDER
    (inner if inner.is_dir() else temporary).rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
