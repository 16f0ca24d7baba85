"""What all tokenizers have in common: special tokens, split pattern, affixes, conversations."""

import hashlib
from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np

from nanochat.text import chat_format
from nanochat.text.chat_format import Conversation

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# GPT-4's pattern, but numbers are split after two digits instead of three: a small vocabulary has
# no room for all three-digit numbers
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
NUM_BYTES = 256
Affix = int | str | None


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError unless there is room for every byte and every special token."""
    least = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size {vocab_size} is below {least}: {NUM_BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens; use --vocab_size={least} or more"
        )


class Tokenizer(ABC):
    """The interface of every tokenizer: encode, decode, special tokens, conversations."""

    @classmethod
    @abstractmethod
    def from_directory(cls, directory: Path | str) -> "Tokenizer":
        """Read what `save` wrote."""

    @abstractmethod
    def save(self, directory: Path | str) -> None:
        """Write the tokenizer as a plain file, atomically."""

    @abstractmethod
    def get_vocab_size(self) -> int:
        """Number of tokens, including the special ones."""

    @abstractmethod
    def get_special_tokens(self) -> set[str]:
        """Names of the special tokens."""

    @abstractmethod
    def _special_id(self, name: str) -> int:
        """Id of one of the special tokens."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become replacement characters."""

    @abstractmethod
    def token_bytes(self) -> list[bytes | None]:
        """Raw bytes of every id, None for special tokens."""

    @abstractmethod
    def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """Ids of each text, without any special token."""

    def encode_special(self, text: str) -> int:
        """Id of a special token. Raises ValueError for any other name."""
        if text not in self.get_special_tokens():
            known = sorted(self.get_special_tokens())
            raise ValueError(f"{text!r} is not a special token; known: {known}")
        return self._special_id(text)

    def get_bos_token_id(self) -> int:
        """Id of the token that begins every document."""
        return self.encode_special(SPECIAL_TOKENS[0])

    def fingerprint(self) -> str:
        """SHA-256 of all tokens in order: two tokenizers with the same ids share it."""
        tokens = ((token or b"special").hex() for token in self.token_bytes())
        return hashlib.sha256(" ".join(tokens).encode()).hexdigest()

    def id_to_token(self, token_id: int) -> str:
        """The token's text."""
        return self.decode([token_id])

    @overload
    def encode(self, text: str, prepend: Affix = ..., append: Affix = ...) -> list[int]: ...

    @overload
    def encode(
        self, text: list[str], prepend: Affix = ..., append: Affix = ..., num_threads: int = ...
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: Affix = None,
        append: Affix = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each text of a list.

        prepend, append  an id or the name of a special token, added to each text.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"text must be a str or a list of str, not {text!r:.60}")
        before, after = self._affix(prepend), self._affix(append)
        batch = self.encode_ordinary_batch(texts, num_threads)
        if before or after:
            batch = [[*before, *ids, *after] for ids in batch]
        return batch[0] if isinstance(text, str) else batch

    __call__ = encode

    def encode_to_numpy(
        self, texts: list[str], prepend: Affix = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, and where each begins: (tokens, offsets).

        prepend  an id or the name of a special token, put before each text.
        tokens   (total,), uint16 if every id of the vocabulary fits, else uint32
        offsets  (len(texts) + 1,) int64; text i is tokens[offsets[i] : offsets[i + 1]]
        """
        dtype = np.uint16 if self.get_vocab_size() <= 2**16 else np.uint32
        tokens, offsets = self._ordinary_to_numpy(texts, num_threads)
        tokens = tokens.astype(dtype, copy=False)
        for token_id in self._affix(prepend):
            tokens = np.insert(tokens, offsets[:-1], token_id)
            offsets = offsets + np.arange(len(offsets))
        return tokens, offsets

    def _ordinary_to_numpy(
        self, texts: list[str], num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        batch = self.encode_ordinary_batch(texts, num_threads)
        offsets = np.cumsum([0, *map(len, batch)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(batch), np.uint32, offsets[-1]), offsets

    def render_conversation(
        self, conversation: Conversation, max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Ids and loss mask of a conversation (`chat_format.render_conversation`)."""
        return chat_format.render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """The prompt for the last answer (`chat_format.render_for_completion`)."""
        return chat_format.render_for_completion(self, conversation)

    def visualize_tokenization(
        self, ids: list[int], mask: list[int], with_token_id: bool = False
    ) -> str:
        """Ids colored by their mask, for a terminal (`chat_format.visualize_tokenization`)."""
        return chat_format.visualize_tokenization(self, ids, mask, with_token_id)

    def _affix(self, value: Affix) -> list[int]:
        if value is None:
            return []
        return [value if isinstance(value, int) else self.encode_special(value)]
