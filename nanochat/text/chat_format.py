"""Conversations as token ids: which tokens frame a turn, and which ones the model is trained on.

A conversation is {"messages": [{"role", "content"}, ...]}: user and assistant take turns, after an
optional system message, which is merged into the first user message. An assistant's content is a
string, or a list of parts {"type": "text" | "python" | "python_output", "text"}: the model learns
to write tool calls, not their output, which the tool writes.

A worked example, with a tokenizer that knows single bytes only (256 of them, then the nine special
tokens from <|bos|> = 256 on):

    >>> conversation = {"messages": [
    ...     {"role": "user", "content": "2*3?"},
    ...     {"role": "assistant", "content": [
    ...         {"type": "python", "text": "2*3"},
    ...         {"type": "python_output", "text": "6"},
    ...         {"type": "text", "text": "6"},
    ...     ]},
    ... ]}
    >>> print(conversation_text(conversation))
    <|bos|><|user_start|>2*3?<|user_end|>
    <|assistant_start|><|python_start|>2*3<|python_end|>
    <|output_start|>6<|output_end|>
    6<|assistant_end|>
    >>> from nanochat.text.tokenizer import byte_tokenizer
    >>> tokenizer = byte_tokenizer()
    >>> ids, mask = render_conversation(tokenizer, conversation)
    >>> for token, trained in zip(ids, mask):
    ...     print(f"{token:3} {trained} {tokenizer.decode([token])}")
    256 0 <|bos|>
    257 0 <|user_start|>
     50 0 2
     42 0 *
     51 0 3
     63 0 ?
    258 0 <|user_end|>
    259 0 <|assistant_start|>
    261 1 <|python_start|>
     50 1 2
     42 1 *
     51 1 3
    262 1 <|python_end|>
    263 0 <|output_start|>
     54 0 6
    264 0 <|output_end|>
     54 1 6
    260 1 <|assistant_end|>

The mask is 1 exactly for the tokens that the model must produce on its own when it chats. At
inference the engine stops at <|assistant_end|> and writes everything between <|output_start|> and
<|output_end|> itself.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the tokenizers import this module
    from nanochat.text.tokenizer_base import Tokenizer

Conversation = dict[str, Any]
# type of a part -> the special tokens around it, and whether the model learns to write it
PART_FRAMES = {
    "text": ("", "", 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}
NO_LIMIT = 2**62


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    is_special  whether `text` names a special token; otherwise it is ordinary text
    trained     1 if the model learns to produce it, else 0
    """

    text: str
    is_special: bool
    trained: int


def segments(conversation: Conversation) -> Iterator[Segment]:
    """The pieces of a conversation in order: special tokens, and the texts between them.

    Raises  ValueError for roles out of turn or content of an unknown type.
    """
    yield Segment("<|bos|>", True, 0)
    for index, message in enumerate(_merge_system(conversation["messages"])):
        role, content = message["role"], message["content"]
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise ValueError(f"message {index} is from {role!r}; the {expected} is next")
        if role == "user":
            if not isinstance(content, str):
                raise ValueError(f"message {index} of the user must be a text, not {content!r}")
            yield Segment("<|user_start|>", True, 0)
            yield Segment(content, False, 0)
            yield Segment("<|user_end|>", True, 0)
            continue
        # The token that opens the assistant's turn is part of the prompt; the one that closes it
        # is the model's own decision, so it is trained on.
        yield Segment("<|assistant_start|>", True, 0)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] not in PART_FRAMES:
                raise ValueError(f"part of type {part['type']!r}; known: {sorted(PART_FRAMES)}")
            opening, closing, trained = PART_FRAMES[part["type"]]
            if opening:
                yield Segment(opening, True, trained)
            yield Segment(part["text"], False, trained)
            if closing:
                yield Segment(closing, True, trained)
        yield Segment("<|assistant_end|>", True, 1)


def conversation_text(conversation: Conversation) -> str:
    """The conversation with its special tokens spelled out, for people to read.

    Only the line breaks after tokens that end something are not part of what a model sees.
    Raises  ValueError as `segments`.
    """
    return "".join(
        f"{text}\n" if is_special and text.endswith("_end|>") else text
        for text, is_special, _ in segments(conversation)
    ).rstrip("\n")


def render_conversation(
    tokenizer: "Tokenizer", conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Token ids and a mask of the same length: 1 for tokens the assistant is trained to produce.

    Both are truncated to max_tokens.
    Raises  ValueError for roles out of turn or content of an unknown type.
    """
    ids: list[int] = []
    mask: list[int] = []
    for segment in segments(conversation):
        # Text is encoded apart from its frame: no merge reaches across a special token, and text
        # that spells a special token's name stays text.
        if segment.is_special:
            tokens = [tokenizer.encode_special(segment.text)]
        else:
            tokens = tokenizer.encode(segment.text)
        ids += tokens
        mask += [segment.trained] * len(tokens)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: "Tokenizer", conversation: Conversation) -> list[int]:
    """The prompt for the assistant's last message: everything before it, and <|assistant_start|>.

    Raises  ValueError if the last message is not the assistant's.
    """
    *messages, last = conversation["messages"]
    if last["role"] != "assistant":
        raise ValueError(f"the last message is from {last['role']!r}, not from the assistant")
    ids, _ = render_conversation(tokenizer, {"messages": messages}, NO_LIMIT)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def visualize_tokenization(
    tokenizer: "Tokenizer", ids: list[int], mask: list[int], with_token_id: bool = False
) -> str:
    """Tokens for a terminal, separated by bars: green where trained on, red where not."""
    red, green, grey, reset = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
    parts = []
    for token_id, trained in zip(ids, mask, strict=True):
        number = f"{grey}({token_id}){reset}" if with_token_id else ""
        parts.append(f"{green if trained else red}{tokenizer.decode([token_id])}{reset}{number}")
    return "|".join(parts)


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the system message in front of the first user message: there are no tokens for it."""
    if not messages or messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise ValueError("a system message must be followed by a message of the user")
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": joined}, *messages[2:]]
