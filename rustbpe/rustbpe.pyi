from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

__version__: str

def default_num_threads() -> int:
    """Processors this process may use: its CPU affinity, limited by the quota of its cgroup and of
    the enclosing ones (a container's, say), rounded up.
    """
@final
class Tokenizer:
    """A byte-level BPE tokenizer: train it, or load ranks, then encode and decode."""

    def __new__(cls) -> Tokenizer:
        """A tokenizer of the 256 bytes, to be trained."""

    @staticmethod
    def from_ranks(
        ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]], pattern: str
    ) -> Tokenizer:
        """A tokenizer of merge ranks {token: rank}, as tiktoken takes them, and a split pattern.

        Raises  ValueError naming a doubled or missing rank, or missing bytes; or for a bad pattern.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        progress: Callable[[str, int, int | None], Any] | None = None,
        num_threads: int | None = None,
        tie_break: Literal["rustbpe", "huggingface"] = "rustbpe",
    ) -> None:
        """Learn a vocabulary from an iterator of texts.

        iterator     yields str; read in batches of up to buffer_size texts or 16 MiB, while the
                     batch before is counted
        vocab_size   tokens wanted, at least 256; fewer are learnt if the text yields no more
        pattern      split pattern, GPT-4's by default
        progress     called some times a second as progress(stage, done, total): ("count", bytes,
                     None), then ("merge", merges, merges wanted); an exception ends the training
        num_threads  threads that count, default_num_threads() by default; one of them merges
        tie_break    "rustbpe" or "huggingface": which of equally frequent pairs comes first

        The result depends on the texts, pattern and tie_break only. A training that fails leaves
        the tokenizer as it was.
        Raises  ValueError for a bad argument, or for text with lone surrogates.
        """

    def get_pattern(self) -> str:
        """The split pattern; empty before training."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(token, rank) of every token, by rank."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises  ValueError before training, or for lone surrogates.
        """

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """Token ids of each text of a sequence, with default_num_threads() threads by default.

        Raises  ValueError as encode.
        """

    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """encode_batch with default_num_threads() threads."""

    def encode_to_numpy(
        self, texts: Sequence[str], num_threads: int | None = None
    ) -> tuple[npt.NDArray[np.uint16] | npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Token ids of all texts in one array, and where each begins: (tokens, offsets).

        tokens   numpy (total,), uint16 if every id fits, else uint32
        offsets  numpy (len(texts) + 1,) int64; text i is tokens[offsets[i]:offsets[i + 1]]

        Raises  ValueError as encode; ImportError without numpy.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids.

        Raises  ValueError for an unknown id; UnicodeDecodeError, a ValueError, if the bytes are
                not UTF-8: then use decode_bytes.
        """

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of token ids. Raises ValueError for an unknown id."""

    def split(self, text: str) -> list[str]:
        """The pieces into which the pattern cuts a text; no token crosses their bounds.

        Raises  ValueError as encode.
        """
