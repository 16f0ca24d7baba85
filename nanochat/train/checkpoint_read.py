"""Finding checkpoints by any name a command line gives them, and reading them.

Everything is loaded with weights_only=True: a checkpoint can hold wrong numbers, never code.
"""

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import stages
from nanochat.common import sha256_of

MODEL_FILE = "model.pt"
META_FILE = "meta.json"
LATEST_LINK = "latest.pt"

# a step being saved again is moved aside under the second name until the new one is in place
STEP_NAME = re.compile(r"(?:\.replaced-)?(\d{6,})")
TAG_NAME = re.compile(r"(?!\d+$)[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
DEPTH_TAG = re.compile(r"d(\d+)")


# what save() writes into every meta.json, whatever the caller adds
META_TYPES = {"step": int, "tag": str, "world_size": int, "files": dict}


class CheckpointNotFoundError(ValueError):
    """No whole checkpoint is where one was looked for."""


class DamagedCheckpointError(ValueError):
    """A file has another content than was saved: an older step may serve instead."""


def stage_dir(base_dir: Path, stage: str) -> Path:
    """The folder of a stage's checkpoints. Raises ValueError for an unknown stage."""
    return base_dir / stages.get(stage).folder


def find(spec: str | int | Path | None, stage: str, base_dir: Path, tag: str | None = None) -> Path:
    """The folder of the step that `spec` names; it is whole: files and sizes match meta.json.

    spec  None: the newest step of `tag`, or of the deepest d<number> tag, or of the tag last
          written. Otherwise a step number, a tag, "latest.pt", or the path of a file, step, tag or
          stage folder, relative to the working directory, the base directory or the stage's.
    Raises  CheckpointNotFoundError (a ValueError) saying what is missing and what there is.
    """
    stage_path = stage_dir(base_dir, stage)
    if spec is None or spec == "":
        return _newest(stage_path if tag is None else stage_path / tag)
    text = str(spec)
    if text.isdigit():
        return _numbered(stage_path, int(text), tag)
    roots = [Path.cwd(), base_dir, stage_path]
    if len(Path(text).parts) == 1:  # a bare name means a tag before a file lying about here
        roots.reverse()
    expanded = Path(text).expanduser()
    if expanded.name.isdigit():
        expanded = expanded.with_name(f"{int(expanded.name):06d}")
    problems = []
    for path in dict.fromkeys(root / expanded for root in roots):
        if path.exists() or path.is_symlink():
            try:
                return _at(path)
            except CheckpointNotFoundError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointNotFoundError(problems[0])
    raise CheckpointNotFoundError(
        f"checkpoint {text!r} is neither under {Path.cwd()} nor under {base_dir}; "
        + _what_there_is(stage_path)
    )


def resumable(spec: str | None, stage: str, base_dir: Path, tag: str) -> list[Path]:
    """The step folders to continue from, the first that can be read; none where there is nothing.

    spec  None: the steps of the tag, from the newest on. As for `find` otherwise: a step, its
          folder or a file in it stand for that step alone; a tag, a stage or latest.pt for the
          newest step and the older ones of its tag.
    Raises  CheckpointNotFoundError as `find` does.
    """
    tag_dir = stage_dir(base_dir, stage) / tag
    if spec is None and not steps_of(tag_dir):
        return []
    newest = find(tag_dir if spec is None else spec, stage, base_dir, tag)
    if spec is not None and names_a_step(spec):
        return [newest]
    number = load_meta(newest)["step"]
    older = [path for step, path in steps_of(newest.parent) if step < number]
    return [newest, *(path for path in older if not problem_of(path))]


def names_a_step(spec: str) -> bool:
    """Whether a name of a checkpoint means one step, not the newest of several."""
    path = Path(spec)
    return path.name.isdigit() or (path.parent.name.isdigit() and path.name != LATEST_LINK)


def has_checkpoint(tag: str, stage: str, base_dir: Path) -> bool:
    """Whether a tag has a whole step to continue from."""
    return any(not problem_of(path) for _, path in steps_of(stage_dir(base_dir, stage) / tag))


def load_meta(path: Path) -> dict[str, Any]:
    """meta.json of a step folder. Raises CheckpointNotFoundError if the folder is not whole."""
    meta, problem = _inspect(path)
    if problem:
        raise CheckpointNotFoundError(f"{path} is not a whole checkpoint: {problem}")
    return meta


def meta_digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 over all of a meta.json but the digest itself, whatever its layout."""
    content = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require(values: Mapping[str, Any], names: Iterable[str], file: Path) -> None:
    """Raise ValueError naming the file and what it lacks of these names."""
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{file} lacks {', '.join(missing)}: another program or version wrote it; use a "
            "checkpoint of this one"
        )


def load_model_state(
    path: Path,
    map_location: torch.device | str = "cpu",
    expected: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The parameters of a step folder, names without torch.compile's "_orig_mod." prefix.

    expected  the state_dict they are for: names and shapes are compared.
    Raises  ValueError naming the file if it is damaged or holds anything but tensors, and naming
            both sides where it does not fit `expected`.
    """
    loaded = _read_tensors(path, MODEL_FILE, map_location)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}
    if expected is None:
        return state
    wanted = {name.removeprefix("_orig_mod."): tensor for name, tensor in expected.items()}
    missing, foreign = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or foreign:
        raise ValueError(
            f"{path / MODEL_FILE} is of another model: it lacks {missing[:3] or 'nothing'} and "
            f"has {foreign[:3] or 'nothing'} beyond; use the sizes in its {META_FILE}"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{path / MODEL_FILE}: {name} is {tuple(state[name].shape)} there and "
                f"{tuple(tensor.shape)} in this model; use the sizes in its {META_FILE}"
            )
    return state


def load_rank_state(
    path: Path, rank: int, map_location: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What `rank` saved of its own. Raises ValueError if the checkpoint has no such rank."""
    world_size = load_meta(path)["world_size"]
    if rank >= world_size:
        raise ValueError(
            f"{path} was saved by {world_size} ranks and holds none for rank {rank}; "
            f"start with --nproc_per_node={world_size}"
        )
    return _read_tensors(path, f"optim_rank{rank}.pt", map_location)


def check_compatible(
    meta: Mapping[str, Any],
    model_config: Mapping[str, object],
    world_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> None:
    """Raise ValueError, naming both values, where a checkpoint's meta does not fit this run.

    world_size, tokenizer_fingerprint  None: not compared (evaluation runs on any number of ranks).
    """
    name = f"checkpoint {meta.get('tag')} step {meta.get('step')}"
    saved_config = meta.get("model_config", {})
    if saved_config.get("vocab_size") != model_config.get("vocab_size"):
        raise ValueError(
            f"{name} has a vocabulary of {saved_config.get('vocab_size')} tokens, this run's "
            f"tokenizer gives {model_config.get('vocab_size')}; use the tokenizer it was trained "
            "with, or another checkpoint"
        )
    saved_fingerprint = meta.get("tokenizer_fingerprint")
    if None not in (saved_fingerprint, tokenizer_fingerprint) and (
        saved_fingerprint != tokenizer_fingerprint
    ):
        raise ValueError(
            f"{name} was trained with tokenizer {saved_fingerprint}, this one is "
            f"{tokenizer_fingerprint}; the same ids mean other text"
        )
    for key in sorted(saved_config.keys() | model_config.keys()):
        if saved_config.get(key) != model_config.get(key):
            raise ValueError(
                f"{name} has {key}={saved_config.get(key)}, this run {model_config.get(key)}; "
                "use the settings it was trained with, or another --model_tag"
            )
    if world_size not in (None, meta["world_size"]):
        raise ValueError(
            f"{name} was saved by {meta['world_size']} ranks and this run has {world_size}: each "
            f"rank's optimizer shard is its own; start with --nproc_per_node={meta['world_size']}"
        )


def _read_tensors(path: Path, name: str, map_location: torch.device | str) -> dict[str, Any]:
    recorded = load_meta(path)["files"].get(name)
    file = path / name
    if recorded is None:
        raise ValueError(f"{path / META_FILE} lists no {name}; the checkpoint is foreign")
    remedy = "load another step, or save this one again"
    if sha256_of(file) != recorded["sha256"]:
        raise DamagedCheckpointError(
            f"{file} is damaged: its SHA-256 is not the recorded one; {remedy}"
        )
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values and was not loaded; {remedy}"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a file of torch.save; {remedy}") from error


def problem_of(path: Path) -> str:
    """Why a folder is not a whole checkpoint, short of reading its tensors; "" if it is one."""
    return _inspect(path)[1]


def _inspect(path: Path) -> tuple[dict[str, Any], str]:
    """meta.json of a step folder, and why the folder is not a whole checkpoint, or ""."""
    try:
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        return {}, f"{META_FILE} cannot be read ({error.strerror})"
    except ValueError:
        return {}, f"{META_FILE} is not one of this project's: it is no JSON"
    if not isinstance(meta, dict):
        return {}, f"{META_FILE} is not one of this project's: it is no object"
    wrong = [name for name, kind in META_TYPES.items() if type(meta.get(name)) is not kind]
    if wrong:
        return {}, f"{META_FILE} is not one of this project's: it has no valid {', '.join(wrong)}"
    # a checkpoint of before there was a digest has none
    if meta.get("sha256", digest := meta_digest(meta)) != digest:
        return {}, f"{META_FILE} is damaged or was changed: its SHA-256 is not the recorded one"
    files = meta["files"]
    for name in (MODEL_FILE, *(f"optim_rank{rank}.pt" for rank in range(meta["world_size"]))):
        entry = files.get(name)
        if not isinstance(entry, dict) or entry.keys() < {"bytes", "sha256"}:
            return {}, f"{META_FILE} lists no {name}"
        if not (path / name).is_file():
            return {}, f"{name} is missing"
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            return {}, f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    return meta, ""


def steps_of(tag_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a step in a tag folder, newest first."""
    found: dict[int, Path] = {}
    for path in sorted(tag_dir.iterdir()) if tag_dir.is_dir() else []:
        name = STEP_NAME.fullmatch(path.name)
        if name and path.is_dir():
            found[int(name[1])] = path  # "." sorts first: the step itself wins over one set aside
    return sorted(found.items(), reverse=True)


def _tags(stage_path: Path) -> list[Path]:
    """Tag folders of a stage: d<number> from the deepest, then others from the last written."""

    def order(path: Path) -> tuple[int, float]:
        depth = DEPTH_TAG.fullmatch(path.name)
        return (int(depth[1]) if depth else -1, path.stat().st_mtime)

    folders = stage_path.iterdir() if stage_path.is_dir() else ()
    return sorted((path for path in folders if steps_of(path)), key=order, reverse=True)


def _newest(folder: Path) -> Path:
    """The newest whole step of a tag folder, or of the first tag of a stage folder."""
    for tag_dir in [folder] if steps_of(folder) else _tags(folder):
        for _, path in steps_of(tag_dir):
            problem = problem_of(path)
            if not problem:
                return path
            warnings.warn(f"skipping {path}: {problem}", stacklevel=3)
    raise CheckpointNotFoundError(f"no checkpoint under {folder}; " + _what_there_is(folder.parent))


def _numbered(stage_path: Path, step: int, tag: str | None) -> Path:
    for tag_dir in _tags(stage_path) if tag is None else [stage_path / tag]:
        for number, path in steps_of(tag_dir):
            if number == step:
                return _at(path)
    where = stage_path if tag is None else stage_path / tag
    raise CheckpointNotFoundError(f"no step {step} under {where}; " + _what_there_is(stage_path))


def _at(path: Path) -> Path:
    """The step folder that an existing path names: a file in it, itself, its tag or its stage."""
    if path.is_symlink() and not path.exists():
        warnings.warn(f"{path} points to nothing; taking the newest step", stacklevel=3)
        return _newest(path.parent)
    resolved = path.resolve()
    folder = resolved if resolved.is_dir() else resolved.parent
    names_step = STEP_NAME.fullmatch(folder.name) or (folder / META_FILE).exists()
    if resolved.is_dir() and not names_step:
        return _newest(folder)
    problem = problem_of(folder)
    if problem:
        raise CheckpointNotFoundError(
            f"{path} is not a whole checkpoint: {problem}; name a folder that holds "
            f"{MODEL_FILE}, optim_rank*.pt and {META_FILE}, or another step"
        )
    return folder


def _what_there_is(stage_path: Path) -> str:
    tags = [f"{tag.name} (steps to {steps_of(tag)[0][0]})" for tag in _tags(stage_path)]
    if not tags:
        return f"{stage_path} holds none yet: train first, or check NANOCHAT_BASE_DIR"
    return f"{stage_path} holds {', '.join(tags[:8])}"
