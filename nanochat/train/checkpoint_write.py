"""Checkpoints that are whole or absent.

    <base_dir>/<stage>_checkpoints/<tag>/<step>/{model.pt, optim_rank<r>.pt, meta.json}
    <base_dir>/<stage>_checkpoints/<tag>/latest.pt -> <step>/model.pt
    <base_dir>/<stage>_checkpoints/latest.pt -> <tag>/<step>/model.pt

A step is written into a hidden folder beside its place, synced to disk, and appears by one rename;
meta.json, written last, holds size and SHA-256 of every file and its own SHA-256.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nanochat.common import Runtime, replace_file
from nanochat.tracking import environment, jsonable
from nanochat.train.checkpoint_read import (
    LATEST_LINK,
    META_FILE,
    MODEL_FILE,
    TAG_NAME,
    meta_digest,
    problem_of,
    steps_of,
)

SPARE_BYTES = 2**20  # directory entries, zip headers, meta.json


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


class NotFiniteError(Exception):
    """A checkpoint was not written because it would have held NaN or infinities."""


def save(
    stage_dir: Path,
    tag: str,
    step: int,
    model_state: Mapping[str, Tensor],
    rank_state: Mapping[str, Any],
    meta: Mapping[str, object],
    runtime: Runtime,
    keep_last: int | None = None,
) -> Path:
    """Write one checkpoint and return its folder; every rank calls this with its own rank_state.

    model_state  the parameters; only rank 0's are written.
    rank_state   what differs by rank: optimizer shard, data position, random state.
    meta         plain values for meta.json; non-finite numbers become null.
    keep_last    how many steps of this tag stay; older ones are deleted; None or 0 keeps all.
    Raises  ValueError for a bad tag or keep_last; on every rank NotFiniteError if a floating-point
            tensor of any rank is not finite, CheckpointWriteError if any rank could not write.
            Ranks must share the file system.
    """
    check_tag(tag)
    if keep_last is not None and keep_last < 0:
        raise ValueError(f"keep_last={keep_last} must be at least 1, or 0 to keep every step")
    assert step >= 0, step
    tag_dir = stage_dir / tag
    target = tag_dir / f"{step:06d}"
    temporary = tag_dir / f".tmp-{step:06d}"
    own_state = [rank_state, model_state] if runtime.is_main else [rank_state]
    own_bytes, not_finite = _num_bytes(own_state), _not_finite([rank_state, model_state])
    totals = torch.tensor([own_bytes, len(not_finite)], device=runtime.device)
    bytes_needed, num_not_finite = runtime.all_reduce(totals).tolist()
    bytes_needed += SPARE_BYTES
    if num_not_finite:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in not_finite[:3])
        where = f"{len(not_finite)} of them here, of the shapes {shapes}" if shapes else "none here"
        raise NotFiniteError(
            f"checkpoint {target} was not written: NaN or infinities in {num_not_finite} tensors "
            f"of weights and optimizer state over all ranks ({where})"
        )
    states = {f"optim_rank{runtime.rank}.pt": dict(rank_state)}
    main_actions = (lambda: None, lambda: None)
    if runtime.is_main:
        states[MODEL_FILE] = dict(model_state)
        values = {**meta, "step": step, "tag": tag, "world_size": runtime.world_size}
        main_actions = (
            lambda: _prepare(temporary, bytes_needed),
            lambda: _publish(temporary, target, values),
        )
    for action in (main_actions[0], lambda: _write_all(temporary, states), main_actions[1]):
        _on_every_rank(action, runtime, temporary, target, bytes_needed)
    if runtime.is_main:
        _link(tag_dir / LATEST_LINK, target / MODEL_FILE)
        _link(stage_dir / LATEST_LINK, target / MODEL_FILE)
        if keep_last:
            _rotate(tag_dir, step, keep_last)
    runtime.barrier()
    return target


def check_tag(tag: str) -> None:
    """Raise ValueError unless `tag` can name a folder of steps."""
    if not TAG_NAME.fullmatch(tag):
        raise ValueError(
            f"tag {tag!r} is no folder name, or looks like a step; use letters, digits "
            "and _ . = + -, with at least one letter, for example d12"
        )


class _HashingWriter:
    """What torch.save needs of a file, with the digest on the way and the disk's error kept."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_tensors(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, writer)  # pyright: ignore[reportArgumentType]  # write and flush do
        except RuntimeError as error:
            # torch reports a failed write as a position that does not add up
            if writer.error is None:
                raise
            raise writer.error from error
        file.flush()
        os.fsync(file.fileno())
    replace_file(path.with_name(path.name + ".sha256"), writer.digest.hexdigest())


def _write_meta(folder: Path, values: Mapping[str, object]) -> None:
    """Write meta.json with the sizes and digests of the files every rank left beside it."""
    files = {}
    for digest in sorted(folder.glob("*.sha256")):
        file = digest.with_suffix("")
        files[file.name] = {"bytes": file.stat().st_size, "sha256": digest.read_text()}
        digest.unlink()
    document = jsonable({**values, "environment": environment(), "files": files})
    document["sha256"] = meta_digest(document)
    replace_file(folder / META_FILE, json.dumps(document, indent=1))
    _sync_directory(folder)


def _on_every_rank(
    action: Callable[[], None], runtime: Runtime, temporary: Path, target: Path, bytes_needed: int
) -> None:
    """Run `action`; where it failed on one rank, raise on all, so that none waits for ever."""
    failure = None
    try:
        action()
    except OSError as error:
        failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int64, device=runtime.device)
    num_failed = int(runtime.all_reduce(failed))
    if num_failed == 0:
        return
    if runtime.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    reason = failure or f"{num_failed} of {runtime.world_size} ranks failed, not this one"
    raise CheckpointWriteError(
        f"cannot save checkpoint {target}, which needs {bytes_needed:,} bytes: {reason}. Earlier "
        "checkpoints are intact. Free space or lower --keep_last, check the permission to write "
        "there, or set NANOCHAT_BASE_DIR to another disk; then resume"
    ) from failure


def _tensors(state: object) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    pending = [state]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)


def _num_bytes(state: object) -> int:
    """Bytes of the tensors in nested containers; one storage in many places counts once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(state))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _not_finite(state: object) -> list[Tensor]:
    """Floating-point tensors with a NaN or an infinity; read in one pass and without a copy."""
    tensors = [t.detach() for t in _tensors(state) if t.is_floating_point() and t.numel()]
    # the smallest and the largest element are finite if all are: aminmax passes a NaN on
    flags = [torch.stack(t.aminmax()).isfinite().all().cpu() for t in tensors]
    return [tensor for tensor, finite in zip(tensors, flags, strict=True) if not finite]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(temporary: Path, target: Path) -> None:
    """Make `temporary` the step `target`; a step already there stays findable until it is."""
    aside = target.with_name(f".replaced-{target.name}")
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    _sync_directory(target.parent)
    if aside.exists():
        _delete_step(aside)


def _prepare(temporary: Path, bytes_needed: int) -> None:
    """Create the hidden folder, clear what killed saves left, refuse where space is short."""
    tag_dir = temporary.parent
    tag_dir.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(tag_dir)
    free = shutil.disk_usage(tag_dir).free
    if free < bytes_needed:
        raise OSError(errno.ENOSPC, f"only {free:,} bytes are free", str(tag_dir))
    temporary.mkdir()


def _write_all(temporary: Path, states: Mapping[str, dict[str, Any]]) -> None:
    for name, state in states.items():
        _write_tensors(temporary / name, state)


def _publish(temporary: Path, target: Path, values: Mapping[str, object]) -> None:
    """Write meta.json over the files of all ranks, then let the step appear."""
    _write_meta(temporary, values)
    _swap_in(temporary, target)


def _clear_leftovers(tag_dir: Path) -> None:
    """Remove what a killed save left; put back a step it had moved aside and not replaced."""
    for aside in tag_dir.glob(".replaced-*"):
        target = aside.with_name(aside.name.removeprefix(".replaced-"))
        if target.exists():
            _delete_step(aside)
        else:
            aside.rename(target)
    for leftover in tag_dir.glob(".tmp-*"):
        shutil.rmtree(leftover)


def _delete_step(path: Path) -> None:
    """Delete a step folder; it is hidden first, so that a kill leaves no visible half."""
    hidden = path.with_name(f".tmp-deleted-{path.name}")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        warnings.warn(f"cannot delete the old checkpoint {path}: {error}", stacklevel=2)


def _rotate(tag_dir: Path, step: int, keep_last: int) -> None:
    """Delete whole steps before `step` beyond `keep_last`; later ones are another run's."""
    steps = [path for number, path in steps_of(tag_dir) if number <= step and not problem_of(path)]
    for path in steps[keep_last:]:
        _delete_step(path)


def _link(link: Path, target: Path) -> None:
    """Point the relative symbolic link `link` to `target`, replacing it atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)
    except OSError as error:  # FAT and some network file systems have no links
        warnings.warn(f"cannot link {link} to {target}: {error}", stacklevel=2)
