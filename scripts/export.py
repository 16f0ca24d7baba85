"""A checkpoint as a folder that transformers opens (NanoChatForCausalLM), and such a folder back.

python -m scripts.export --checkpoint=chatsft_checkpoints/latest.pt --output=my-model
python -m scripts.export --from_hf=my-model

The folder holds weights, configuration, tokenizer, chat template and a model card with the results
in the records. It appears whole, by one rename.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import command, configurator, report, stages
from nanochat.common import Runtime, print0, setup_training
from nanochat.gpt import GPT, GPTConfig
from nanochat.infer import huggingface
from nanochat.locks import OwnedLock
from nanochat.serve.config import ServerConfig
from nanochat.settings import Choices
from nanochat.text import tokenizer_json
from nanochat.text.tokenizer import RANKS_FILE, get_tokenizer
from nanochat.tracking import write_json
from nanochat.train import checkpoint_read, checkpoint_write, precision

WEIGHTS, PADDING = "model.safetensors", "padding.safetensors"
OURS = "nanochat.json"  # what a checkpoint is beyond its weights; marks a folder as ours
KEPT = ("stage", "tag", "step", "num_iterations", "model_config", "tokenizer_fingerprint")


@dataclass(frozen=True)
class Settings:
    """Write a checkpoint as a folder for transformers, or bring one back."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: Annotated[str, Choices(stages.sources), tyro.conf.arg(aliases=["-i"])] = "sft"  # stage
    model_tag: str = ""  # tag to look in; with --from_hf the tag to write, else the exported one
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    output: str = ""  # folder to write; empty is <base dir>/exports/<stage>-<tag>-<step>
    overwrite: bool = False  # replace an exported folder, or with --from_hf a checkpoint
    from_hf: str = ""  # folder of a NanoChatForCausalLM to make a checkpoint of instead


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training("cpu")
    if runtime.world_size > 1:
        raise ValueError(f"export is one process, not {runtime.world_size}; start it with python")
    print0(bring_back(settings, runtime) if settings.from_hf else write(settings, runtime))


def write(settings: Settings, runtime: Runtime) -> Path:
    """The folder written from the checkpoint that the settings name.

    Raises  ValueError for a checkpoint or tokenizer that the layout cannot hold, or a folder that
            is not to be replaced; nothing is written then.
    """
    stage = stages.of_checkpoint(settings.source, settings.checkpoint)
    path = checkpoint_read.find(
        settings.checkpoint, stage.name, runtime.base_dir, settings.model_tag or None
    )
    meta = checkpoint_read.load_meta(path)
    file = path / checkpoint_read.META_FILE
    checkpoint_read.require(meta, ["model_config", "stage"], file)
    if precision.QUANTIZED in meta:
        raise ValueError(
            f"{file}: {precision.QUANTIZED} {meta[precision.QUANTIZED]}: NanoChatForCausalLM holds "
            "plain weights only; export the checkpoint that was quantized"
        )
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    checkpoint_read.check_compatible(
        meta,
        meta["model_config"] | {"vocab_size": tokenizer.get_vocab_size()},
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )
    name = f"{meta['stage']}-{meta['tag']}-{meta['step']:06d}"
    target = Path(settings.output or runtime.base_dir / "exports" / name).expanduser()
    check_replaceable(target, settings.overwrite)
    config = GPTConfig(**meta["model_config"])
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    weights, padding = huggingface.to_huggingface(
        checkpoint_read.load_model_state(path, expected=expected), config
    )
    drawn = ServerConfig.temperature, ServerConfig.top_k
    values: dict[str, Any] = {
        "config.json": huggingface.config_json(config, tokenizer),
        "generation_config.json": huggingface.generation_config(tokenizer, *drawn),
        "tokenizer_config.json": tokenizer_json.tokenizer_config(config.sequence_len),
        OURS: {name: meta[name] for name in KEPT if name in meta},
    }
    results = report.results(path.parent, meta["step"])
    made_by = stages.get(meta["stage"]).title
    texts = {
        "tokenizer.json": tokenizer_json.to_json(tokenizer),
        "chat_template.jinja": tokenizer_json.chat_template(),
        "README.md": huggingface.model_card(target.name, made_by, config, results),
    }
    with appearing(target) as folder:
        for file_name, value in values.items():
            write_json(folder / file_name, value)
        for file_name, text in texts.items():
            (folder / file_name).write_text(text, encoding="utf-8")
        save(weights, folder / WEIGHTS)
        if padding:
            save(padding, folder / PADDING)
    return target


def bring_back(settings: Settings, runtime: Runtime) -> Path:
    """The checkpoint written from a folder, the tokenizer beside where there is none.

    Raises  ValueError for what no checkpoint of ours can be, another tokenizer in its place, or a
            checkpoint that is not to be replaced; nothing is written then.
    """
    folder = Path(settings.from_hf).expanduser()
    config = huggingface.gpt_config(read_json(folder / "config.json"))
    known = read_json(folder / OURS) if (folder / OURS).exists() else {}
    tokenizer = tokenizer_json.from_json((folder / "tokenizer.json").read_bytes())
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size():,} tokens, config.json "
            f"{config.vocab_size:,}; use the files of one model"
        )
    fingerprint = tokenizer.fingerprint()
    tokenizer_dir = Path(settings.tokenizer_dir or runtime.base_dir / "tokenizer")
    has_tokenizer = (tokenizer_dir / RANKS_FILE).exists()
    if has_tokenizer and get_tokenizer(tokenizer_dir).fingerprint() != fingerprint:
        raise ValueError(
            f"{tokenizer_dir} holds another tokenizer than {folder}; name a new folder with "
            "--tokenizer_dir, here and wherever the model is used"
        )
    stage = known.get("stage") or stages.of_checkpoint(settings.source, "").name
    tag = str(settings.model_tag or known.get("tag") or folder.resolve().name)
    step = known.get("step", 0)
    if type(step) is not int or step < 0:
        raise ValueError(f"{folder / OURS}: step {step!r} must be an integer of at least 0")
    checkpoint_write.check_tag(tag)
    state = huggingface.from_huggingface(read_weights(folder), config)
    stage_dir = checkpoint_read.stage_dir(runtime.base_dir, stage)
    meta = known | {
        "stage": stage,
        "model_config": vars(config),
        "tokenizer_fingerprint": fingerprint,
        "parent": str(folder.resolve()),
    }
    with OwnedLock(stage_dir / tag / ".run", "use another --model_tag"):
        at = stage_dir / tag / f"{step:06d}"
        if at.exists() and not settings.overwrite:
            raise ValueError(f"{at} exists; use another --model_tag, or --overwrite to replace it")
        if not has_tokenizer:
            tokenizer.save(tokenizer_dir)
        return checkpoint_write.save(stage_dir, tag, step, state, {}, meta, runtime)


def save(weights: dict[str, Tensor], file: Path) -> None:
    """Write tensors; where that fails, raise OSError as any other file does."""
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    file.chmod(file.parent.stat().st_mode & 0o666)  # the library leaves it to the owner alone


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no object but {value!s:.40}")
    return value


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of every *.safetensors file: large models come in several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no {WEIGHTS}; save the model with safe_serialization")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    return weights


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raise ValueError where something is that must stay."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / OURS).is_file():
        raise ValueError(f"{target} exists and is no exported model; name another --output")
    if not overwrite:
        raise ValueError(f"{target} exists; name another --output, or replace it with --overwrite")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, or is deleted after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (target.with_name(f".{target.name}.{x}") for x in ("tmp", "old"))
    settle(target, temporary, aside)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())  # the rename must not reach the disk before the files
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    finally:
        settle(target, temporary, aside)


def settle(target: Path, temporary: Path, aside: Path) -> None:
    """Put back a folder that was moved aside and not replaced; remove what is left over."""
    if aside.exists() and not target.exists():
        aside.rename(target)
    for leftover in (temporary, aside):
        if leftover.exists():
            shutil.rmtree(leftover)


if __name__ == "__main__":
    command.run(main)
