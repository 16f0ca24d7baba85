"""SmolTalk: general conversations, for training only (arXiv:2502.02737)."""

from pathlib import Path

from nanochat.text.chat_format import Conversation
from tasks.common import Task, shuffled
from tasks.sources import Source

SOURCE = Source(
    repository="HuggingFaceTB/smol-smoltalk",
    revision="f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
    places=("smoltalk/data", "smoltalk"),
    splits=("train", "test"),
    columns=("messages",),
)


class SmolTalk(Task):
    """Conversations of several turns, some of which begin with a system message.

    split   train or test; both are free of the benchmarks in this folder
    Raises  ValueError for an unknown split or where files are missing.
    """

    def __init__(self, split: str, task_data: Path | str = "", **view: int | None) -> None:
        self.rows = SOURCE.load(split, task_data)
        self.order = shuffled(len(self.rows))
        super().__init__(len(self.rows), **view)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.rows[self.order[index]]["messages"]}
