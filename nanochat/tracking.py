"""Records of a run: metrics.jsonl always, Weights & Biases when a run is named.

One record is one line of strict JSON with `time`, `run`, `stage`, `kind` and `step`. A run begins
with a "start" record (environment, settings, kernels); a resumed one keeps its identifier and
continues the same file, so a file reads as if the run had never stopped.
"""

import dataclasses
import importlib
import json
import math
import os
import platform
import subprocess
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nanochat import hardware
from nanochat.common import Runtime, replace_file

METRICS_FILE = "metrics.jsonl"
RESERVED = ("time", "run", "stage", "kind", "step")


class DummyWandb:
    """Takes what a wandb run takes, and drops it."""

    def log(self, data: Mapping[str, object], step: int | None = None) -> None:
        """Drop `data`."""

    def finish(self) -> None:
        """Do nothing."""


class Tracker:
    """Appends the records of one stage to `<run_dir>/metrics.jsonl`; silent off rank 0.

    settings     a dataclass or mapping, stored in the "start" record.
    run          "dummy", or the name of a wandb run.
    resume_step  the step of the checkpoint the run continues from; later records of the
                 interrupted run are dropped, and what that step already logged is not repeated.
    header       further values of the "start" record (kernels, checkpoint, ...).
    Raises  ValueError if wandb is asked for and absent; OSError, with the path, if the file cannot
    be written.
    """

    def __init__(
        self,
        run_dir: Path,
        runtime: Runtime,
        stage: str,
        settings: object,
        run: str = "dummy",
        resume_step: int | None = None,
        header: Mapping[str, object] | None = None,
    ) -> None:
        self.path = run_dir / METRICS_FILE
        self.stage = stage
        self.is_main = runtime.is_main
        self.run_id = uuid.uuid4().hex[:12]
        self._wandb: Any = DummyWandb()
        self._already: set[tuple[object, ...]] = set()
        self._file = None
        if not self.is_main:
            return
        wandb = _import_wandb(run) if run != "dummy" else None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                self._continue(resume_step)
            _end_last_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write the records ({error.strerror}); check the permission to write "
                "there, or set NANOCHAT_BASE_DIR to a folder you may write",
                str(self.path),
            ) from error
        if wandb is not None:
            self._wandb = wandb.init(
                project="nanochat",
                name=run,
                id=self.run_id,
                resume="allow",
                group=stage,
                config=jsonable(settings),
                dir=str(run_dir),
            )
        self.log(
            "start" if resume_step is None else "resume",
            resume_step or 0,
            settings=settings,
            environment=environment(),
            **dict(header or {}),
        )

    def log(self, kind: str, step: int, **values: object) -> None:
        """Append one record and flush it, so that a kill loses no line.

        Numbers that JSON lacks (NaN, infinities) are written as null.
        """
        if self._file is None:
            return
        assert not set(values) & set(RESERVED), f"{RESERVED} name other things in a record"
        record: dict[str, object] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "run": self.run_id,
            "stage": self.stage,
            "kind": kind,
            "step": step,
        }
        record.update({name: jsonable(value) for name, value in values.items()})
        if _identity(record) in self._already:
            return
        try:
            self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"cannot append to the records ({error.strerror})", str(self.path)
            ) from error
        numbers = {
            f"{kind}/{name}": value
            for name, value in record.items()
            if name not in RESERVED and isinstance(value, int | float)
        }
        if numbers:
            self._wandb.log(numbers, step=step)

    def message(self, text: str) -> None:
        """Print a line for the person at the console, on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        """Close the file and the wandb run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._wandb.finish()

    def _continue(self, resume_step: int) -> None:
        """Take up the last run of this stage in the file, cut back to `resume_step`."""
        records = read_records(self.path)
        started = [r for r in records if r.get("stage") == self.stage and r.get("kind") == "start"]
        if not started:
            return
        self.run_id = str(started[-1].get("run", self.run_id))
        kept = []
        for record in records:
            if record.get("run") == self.run_id:
                if record.get("step", 0) > resume_step or record.get("kind") == "end":
                    continue
                if record.get("step") == resume_step and record.get("kind") != "resume":
                    self._already.add(_identity(record))
            kept.append(record)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        replace_file(self.path, "".join(lines))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; [] if there is none. A line a kill cut short is skipped."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def environment() -> dict[str, Any]:
    """Commit, versions and machine of this process, as plain values for a record."""
    return {
        **_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nanochat": _version("nanochat"),
        "hardware": hardware.describe(),
    }


def jsonable(value: object) -> Any:
    """`value` as strict JSON can hold it: non-finite numbers become null, unknown objects text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, torch.Tensor):
        return jsonable(value.detach().tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    item = getattr(value, "item", None)  # a numpy scalar
    return jsonable(item()) if callable(item) else str(value)


def write_json(path: Path, value: object) -> None:
    """Write a value as strict, indented JSON, whole or not at all."""
    replace_file(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")


def _identity(record: Mapping[str, object]) -> tuple[object, ...]:
    """What a record is about: its step and every name in it (run, kind, split, task, prompt, ...).

    Numbers are what was measured; the same thing measured again has the same identity.
    """
    named = {k: v for k, v in record.items() if isinstance(v, str) and k != "time"}
    return (record.get("step"), *sorted(named.items()))


def _end_last_line(path: Path) -> None:
    """Give a file that a kill left without a final newline one, so that lines never merge."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _commit() -> dict[str, object]:
    root = Path(__file__).parent.parent
    unknown: dict[str, object] = {"commit": None, "dirty": None}
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return unknown
    return {"commit": commit, "dirty": bool(status)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_wandb(run: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--run={run} records to wandb, which is not installed; "
            "install it with `uv sync --extra wandb`, or use --run=dummy"
        ) from error
