"""Conversations of your own, one JSON value per line.

A line is a list of messages, or an object with that list under "messages":

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! I am nanochat."}]
"""

from pathlib import Path
from typing import Any

from nanochat.files import read_json_lines
from nanochat.text.chat_format import PART_FRAMES, Conversation
from tasks.common import Task
from tasks.sources import data_folder

IDENTITY = "identity_conversations.jsonl"


class CustomJSON(Task):
    """The conversations of a JSONL file, in its order.

    Raises  ValueError if the file is missing or empty, or naming the line that is not a
            conversation.
    """

    eval_type = "none"

    def __init__(self, path: Path | str, **view: int | None) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name a JSONL file of conversations")
        self.conversations: list[Conversation] = []
        for where, value in read_json_lines(path):
            messages = value.get("messages") if isinstance(value, dict) else value
            check_messages(messages, where)
            self.conversations.append({"messages": messages})
        if not self.conversations:
            raise ValueError(f"{path} has no conversations; write one per line")
        super().__init__(len(self.conversations), **view)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def identity(task_data: Path | str = "") -> CustomJSON:
    """Conversations about who the model is: identity_conversations.jsonl of the data folder if it
    exists, otherwise the file in tasks/data/.
    """
    own = data_folder(task_data) / IDENTITY
    return CustomJSON(own if own.is_file() else Path(__file__).parent / "data" / IDENTITY)


def check_messages(messages: Any, where: str) -> None:
    """Raises ValueError, beginning with `where`, unless these are the messages of a conversation:
    an optional system message, then user and assistant in turn, ending with an assistant, none
    of them empty.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: a conversation is a list of messages, not {messages!r:.60}")
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if not turns or len(turns) % 2:
        raise ValueError(f"{where}: {len(turns)} messages; pairs of user and assistant are needed")
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.get("role") != expected:
            raise ValueError(f"{where}: a message of {message.get('role')!r}; {expected} is next")
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, list) and content:
            filled = all(part.get("type") in PART_FRAMES and part.get("text") for part in content)
        else:
            filled = isinstance(content, str) and content.strip() != ""
        if not filled:
            raise ValueError(f"{where}: the {message['role']} says {content!r:.60}; write a text")
