"""What every chat script starts with: device, kernels, tokenizer, the model of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanochat import stages
from nanochat.common import Runtime, print0, setup_training
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.kernels.registry import format_choices, select
from nanochat.settings import Choices, ModelSettings
from nanochat.stages import Stage
from nanochat.text.tokenizer import get_tokenizer
from nanochat.text.tokenizer_base import Tokenizer
from nanochat.train import run


@dataclass(frozen=True)
class ChatSettings(ModelSettings):
    """Settings that chat_cli, chat_web and chat_eval have in common."""

    source: Annotated[str, Choices(stages.sources), tyro.conf.arg(aliases=["-i"])] = "sft"  # stage
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # tag to look in


@dataclass(frozen=True)
class ChatModel:
    """A loaded chat model.

    stage  that it is from
    meta   of the checkpoint, whose folder is `path`
    """

    runtime: Runtime
    tokenizer: Tokenizer
    model: GPT
    meta: dict[str, Any]
    path: Path
    stage: Stage

    def engine(self, num_slots: int) -> Engine:
        """An engine that answers num_slots requests at once."""
        return Engine(self.model, self.tokenizer, num_slots)


def load_chat_model(
    settings: ChatSettings, seed: int = 42, print_kernels: bool = True
) -> ChatModel:
    """Load the model that the settings name, ready for inference.

    print_kernels  print which implementation of each operation was chosen.
    Raises         ValueError for an unknown source, kernel or device, or a checkpoint that is
                   missing or does not fit.
    """
    stage = stages.of_checkpoint(settings.source, settings.checkpoint)
    runtime = setup_training(settings.device, seed)
    # before the model is built: layers ask for their kernels when they are called
    choices = select(settings.kernels, runtime.device, runtime.dtype)
    if print_kernels:
        print0(format_choices(choices, settings.verbose))
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, meta, path = run.load_pretrained(
        settings.checkpoint, stage.name, runtime, tokenizer, settings.model_tag
    )
    model.eval()
    return ChatModel(runtime, tokenizer, model, meta, path, stage)
