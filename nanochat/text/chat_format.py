"""Conversations as token ids: which tokens frame a turn, and which ones the model is trained on.

A conversation is {"messages": [{"role", "content"}, ...]}: user and assistant in turn, perhaps
a system message first, which joins the first user message. An assistant's content is a text, or
parts {"type": "text" | "python" | "python_output", "text"}: tool calls are trained on, their
output is not.
"""

import copy
from typing import Any

from nanochat.text.tokenizer_base import Tokenizer

Conversation = dict[str, Any]
PART_FRAMES = {
    "text": ("", "", 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Token ids and a mask of the same length: 1 for tokens the assistant is trained to produce.

    Both are cut after max_tokens.
    Raises  ValueError for roles out of turn or content of an unknown kind.
    """
    ids: list[int] = [tokenizer.get_bos_token_id()]
    mask: list[int] = [0]

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    def special(name: str, trained: int) -> None:
        if name:
            add([tokenizer.encode_special(name)], trained)

    for index, message in enumerate(_merge_system(conversation["messages"])):
        role, content = message["role"], message["content"]
        wanted = "assistant" if index % 2 else "user"
        if role != wanted:
            raise ValueError(f"message {index} is from {role!r}; the {wanted} is next")
        if role == "user":
            if not isinstance(content, str):
                raise ValueError(f"message {index} of the user must be a text, not {content!r}")
            special("<|user_start|>", 0)
            add(tokenizer.encode(content), 0)
            special("<|user_end|>", 0)
            continue
        special("<|assistant_start|>", 0)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] not in PART_FRAMES:
                raise ValueError(f"part of type {part['type']!r}; known: {sorted(PART_FRAMES)}")
            before, after, trained = PART_FRAMES[part["type"]]
            special(before, trained)
            add(tokenizer.encode(part["text"]), trained)
            special(after, trained)
        special("<|assistant_end|>", 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The conversation up to the assistant's last message, and the token that begins it anew.

    Raises  ValueError if the last message is not the assistant's.
    """
    conversation = copy.deepcopy(conversation)
    last = conversation["messages"].pop()
    if last["role"] != "assistant":
        raise ValueError(f"the last message is from {last['role']!r}, not from the assistant")
    length_of_all = 2**62
    ids, _ = render_conversation(tokenizer, conversation, length_of_all)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def visualize_tokenization(
    tokenizer: Tokenizer, ids: list[int], mask: list[int], with_token_id: bool = False
) -> str:
    """Tokens for a terminal, parted by bars: green where trained on, red where not."""
    red, green, grey, reset = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
    parts = []
    for token_id, trained in zip(ids, mask, strict=True):
        number = f"{grey}({token_id}){reset}" if with_token_id else ""
        parts.append(f"{green if trained else red}{tokenizer.decode([token_id])}{reset}{number}")
    return "|".join(parts)


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not messages or messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise ValueError("a system message must be followed by a message of the user")
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": joined}, *messages[2:]]
