"""SmolTalk: general conversations, for training only (arXiv:2502.02737).

A sample conversation of the same form; the system message becomes a part of the user's:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.smoltalk import SmolTalk
    >>> task = SmolTalk("test", "tests/tasks/fixtures")[2:]
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>Answer briefly.
    <BLANKLINE>
    Name a color.<|user_end|>
    <|assistant_start|>Blue.<|assistant_end|>
    >>> task.evaluate(task[0], "Hello!")
    Traceback (most recent call last):
    NotImplementedError: SmolTalk has no right answers to compare with
"""

from nanochat.text.chat_format import Conversation
from tasks.registry import TaskEntry
from tasks.rows import Row
from tasks.sources import DatasetTask, Source


class SmolTalk(DatasetTask):
    """Conversations of several turns, some of which begin with a system message.

    split   train or test; both are free of the benchmarks in this folder
    Raises  ValueError for an unknown split or missing files.
    """

    eval_type = "none"
    source = Source(
        repository="HuggingFaceTB/smol-smoltalk",
        revision="f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
        places=("smoltalk/data", "smoltalk"),
        splits=("train", "test"),
        columns=("messages",),
    )

    def conversation(self, row: Row) -> Conversation:
        return {"messages": row["messages"]}


TASKS = (TaskEntry("SmolTalk", SmolTalk, source=SmolTalk.source),)
