"""Supervised fine-tuning: only what the assistant says is learned, one conversation a row.

python -m scripts.chat_sft --mid_checkpoint=mid_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from dataclasses import dataclass
from typing import Annotated

from nanochat import stages
from nanochat.settings import Choices
from nanochat.train.session import TrainingSettings

PACKINGS = ("padded", "packed")  # of the loader's: those that learn the assistant's side only


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """Fine-tune a mid-trained model on the assistant's side of conversations."""

    mid_checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    source: Annotated[str, Choices(stages.parents_of("chatsft"))] = "mid"  # its stage
