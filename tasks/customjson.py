"""Conversations of your own, one JSON value a line.

A line is a list of messages, or an object with that list under "messages":

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! I am nanochat."}]
"""

from pathlib import Path
from typing import Any

from nanochat.text.chat_format import PART_FRAMES, Conversation
from tasks.common import Task
from tasks.sources import data_folder, read_json_lines

IDENTITY = "identity_conversations.jsonl"


class CustomJSON(Task):
    """The conversations of a JSONL file, in its order.

    Raises  ValueError where the file is missing or empty, or naming the line that is no
            conversation.
    """

    def __init__(self, path: Path | str, **view: int | None) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"{path} is no file; name a JSONL file of conversations")
        self.conversations: list[Conversation] = []
        for where, value in read_json_lines(path):
            messages = value.get("messages") if isinstance(value, dict) else value
            check_messages(messages, where)
            self.conversations.append({"messages": messages})
        if not self.conversations:
            raise ValueError(f"{path} has no conversations; write one a line")
        super().__init__(len(self.conversations), **view)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def identity(task_data: Path | str = "") -> CustomJSON:
    """Who the model is: identity_conversations.jsonl of the data folder if it is there, otherwise
    the ones that come with the code.
    """
    own = data_folder(task_data) / IDENTITY
    return CustomJSON(own if own.is_file() else Path(__file__).parent / "data" / IDENTITY)


def check_messages(messages: Any, where: str) -> None:
    """Raises ValueError, beginning with `where`, unless these are the messages of a conversation:
    a system message perhaps, then user and assistant in turn up to an assistant, none empty.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: a conversation is a list of messages, not {messages!r:.60}")
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if not turns or len(turns) % 2:
        raise ValueError(f"{where}: {len(turns)} messages; pairs of user and assistant are needed")
    for index, message in enumerate(turns):
        wanted = "assistant" if index % 2 else "user"
        if message.get("role") != wanted:
            raise ValueError(f"{where}: a message of {message.get('role')!r}; {wanted} is next")
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, list) and content:
            filled = all(part.get("type") in PART_FRAMES and part.get("text") for part in content)
        else:
            filled = isinstance(content, str) and content.strip() != ""
        if not filled:
            raise ValueError(f"{where}: the {message['role']} says {content!r:.60}; a text is due")
