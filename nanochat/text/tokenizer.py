"""Byte-level BPE tokenizers in the manner of GPT-4: train, encode, decode, save as plain files.

    RustBPETokenizer      trained and run by rustbpe, or run by tiktoken, with the same ids
    TiktokenTokenizer     run by tiktoken; also one of its own encodings
    HuggingFaceTokenizer  trained and run by Hugging Face tokenizers

All end with the nine special tokens. Text never becomes a special token, whatever it contains; only
`encode_special` and the conversation format make them.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tiktoken
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat.common import get_base_dir, replace_file
from nanochat.text.tokenizer_base import (
    NUM_BYTES,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    check_vocab_size,
)
from rustbpe import Tokenizer as RustTokenizer

RANKS_FILE = "tokenizer_ranks.json"
HUGGING_FACE_FILE = "tokenizer.json"
Encoder = Literal["rustbpe", "tiktoken"]


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding whose last ids are the special tokens."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    @classmethod
    def from_pretrained(cls, name: str) -> "TiktokenTokenizer":
        """One of tiktoken's encodings ("gpt2", "cl100k_base"), fetched and cached by tiktoken."""
        return cls(tiktoken.get_encoding(name))

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], pattern: str) -> "TiktokenTokenizer":
        """From the merge ranks of a byte-level BPE; special tokens get the ids after the last rank.

        Raises  ValueError if ranks are missing or repeated.
        """
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(
                f"the {len(ranks)} ranks are not the numbers 0 to {len(ranks) - 1}, each once; "
                "train the tokenizer again"
            )
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        return cls(
            tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        )

    @classmethod
    def from_directory(cls, directory: Path | str) -> "TiktokenTokenizer":
        """Read what `save` wrote.

        Raises  ValueError naming the file and the command that makes one.
        """
        path = Path(directory) / RANKS_FILE
        if not path.is_file():
            raise ValueError(
                f"there is no tokenizer at {path}; train one with python -m scripts.tok_train"
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(stored["tokens"])}
            pattern, special = stored["pattern"], stored["special_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); train again with python -m scripts.tok_train"
            ) from error
        if tuple(special) != SPECIAL_TOKENS or len(ranks) != len(stored["tokens"]):
            raise ValueError(
                f"{path} is not a tokenizer of this version (special tokens or ranks differ); "
                "train again with python -m scripts.tok_train"
            )
        return cls.from_ranks(ranks, pattern)

    def save(self, directory: Path | str) -> None:
        """Write pattern, ranks and special tokens as JSON, in one step."""
        ranks = self.encoding._mergeable_ranks
        by_rank = sorted(ranks, key=ranks.__getitem__)
        stored = {
            "pattern": self.encoding._pat_str,
            "special_tokens": SPECIAL_TOKENS,
            "tokens": [base64.b64encode(token).decode("ascii") for token in by_rank],
        }
        replace_file(Path(directory) / RANKS_FILE, json.dumps(stored, indent=0))

    def get_vocab_size(self) -> int:
        """Tokens and special tokens."""
        return self.encoding.n_vocab

    def get_special_tokens(self) -> set[str]:
        return self.encoding.special_tokens_set

    def _special_id(self, name: str) -> int:
        return self.encoding.encode_single_token(name)

    def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        if len(texts) == 1:
            return [self.encoding.encode_ordinary(texts[0])]
        return self.encoding.encode_ordinary_batch(texts, num_threads=num_threads)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def token_bytes(self) -> list[bytes | None]:
        special = {self.encode_special(name) for name in self.get_special_tokens()}
        return [
            None if i in special else self.encoding.decode_single_token_bytes(i)
            for i in range(self.get_vocab_size())
        ]


class RustBPETokenizer(TiktokenTokenizer):
    """Trained and run by rustbpe, or run by tiktoken: the ids are the same.

    encoder  "rustbpe" or "tiktoken"; by default rustbpe, unless it is the published one, which
             cannot load ranks. The attribute tells which it is.
    """

    def __init__(self, encoding: tiktoken.Encoding, encoder: Encoder | None = None) -> None:
        """Raises ValueError for an encoder that is unknown or not there."""
        super().__init__(encoding)
        load = getattr(RustTokenizer, "from_ranks", None)
        self.encoder: Encoder = encoder or ("rustbpe" if load else "tiktoken")
        if self.encoder not in get_args(Encoder):
            raise ValueError(f"encoder {encoder!r} is not one of {get_args(Encoder)}")
        if self.encoder == "tiktoken":
            self.rust = None
        elif load is None:
            raise ValueError(
                "encoder 'rustbpe' needs the rustbpe of this repository, and the published one is "
                "installed; install cargo and run dev/install.sh, or use encoder='tiktoken'"
            )
        else:
            self.rust = load(encoding._mergeable_ranks, encoding._pat_str)

    def __reduce__(self) -> tuple:
        return type(self), (self.encoding, self.encoder)

    def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        if self.rust is None:
            return super().encode_ordinary_batch(texts, num_threads)
        try:
            return self.rust.encode_batch(texts, num_threads)
        except UnicodeEncodeError:
            return self.rust.encode_batch(list(map(replace_surrogates, texts)), num_threads)

    def _ordinary_to_numpy(
        self, texts: list[str], num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.rust is None:
            return super()._ordinary_to_numpy(texts, num_threads)
        try:
            return self.rust.encode_to_numpy(texts, num_threads)
        except UnicodeEncodeError:
            return self.rust.encode_to_numpy(list(map(replace_surrogates, texts)), num_threads)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN
    ) -> "RustBPETokenizer":
        """Learn vocab_size tokens, the special ones among them, from a stream of texts.

        Raises  ValueError if vocab_size is too small, or the text too little for so many tokens.
        """
        check_vocab_size(vocab_size)
        trainer = RustTokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
        ranks = dict(trainer.get_mergeable_ranks())
        if len(ranks) != vocab_size - len(SPECIAL_TOKENS):
            raise ValueError(
                f"the text yields {len(ranks) + len(SPECIAL_TOKENS):,} distinct tokens, not "
                f"{vocab_size:,}; use a smaller --vocab_size or more text"
            )
        trained = cls.from_ranks(ranks, trainer.get_pattern())
        assert isinstance(trained, cls)
        return trained


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` byte-level BPE; the same interface."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN
    ) -> "HuggingFaceTokenizer":
        """Learn vocab_size tokens, the special ones last, from a stream of texts."""
        check_vocab_size(vocab_size)
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
        # the field's regex engines differ in possessive quantifiers; here greedy ones are the same
        regex = tokenizers.Regex(pattern.replace("?+", "?").replace("++", "+"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(regex, behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            show_progress=False,
            min_frequency=0,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(iter(texts), trainer)
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(tokenizer)

    @classmethod
    def from_directory(cls, directory: Path | str) -> "HuggingFaceTokenizer":
        """Read a tokenizer.json."""
        path = Path(directory) / HUGGING_FACE_FILE
        if not path.is_file():
            raise ValueError(f"there is no {path}; save a HuggingFaceTokenizer there first")
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    @classmethod
    def from_pretrained(cls, name: str) -> "HuggingFaceTokenizer":
        """A tokenizer of the Hugging Face Hub."""
        return cls(tokenizers.Tokenizer.from_pretrained(name))

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json, in one step."""
        replace_file(Path(directory) / HUGGING_FACE_FILE, self.tokenizer.to_str())

    def get_vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def get_special_tokens(self) -> set[str]:
        return {t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special}

    def _special_id(self, name: str) -> int:
        token_id = self.tokenizer.token_to_id(name)
        assert token_id is not None
        return token_id

    def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """As the base class says; the library chooses its threads itself.

        It does not look for special tokens: their text is cut by the model alone.
        """
        pre_tokenizer, model = self.tokenizer.pre_tokenizer, self.tokenizer.model
        assert pre_tokenizer is not None
        return [
            [
                token.id
                for piece, _ in pre_tokenizer.pre_tokenize_str(text)
                for token in model.tokenize(piece)
            ]
            for text in texts
        ]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes | None]:
        to_byte = {char: byte for byte, char in byte_level_alphabet().items()}
        special = self.get_special_tokens()
        names = [self.tokenizer.id_to_token(i) for i in range(self.get_vocab_size())]
        return [None if n in special else bytes(to_byte[c] for c in n or "") for n in names]


def replace_surrogates(text: str) -> str:
    """Pairs of surrogates become the character they mean, lone ones U+FFFD, as in tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_level_alphabet() -> dict[int, str]:
    """byte -> the printable character that stands for it in a byte-level vocabulary (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(NUM_BYTES) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(NUM_BYTES + i) for i, b in enumerate(others)}


def byte_tokenizer() -> TiktokenTokenizer:
    """A tokenizer without merges: ids 0 to 255 are bytes, 256 to 264 the special tokens.

    It needs no training and its ids can be read off an ASCII table: for examples and tests.
    """
    return TiktokenTokenizer.from_ranks({bytes([i]): i for i in range(NUM_BYTES)}, r"(?s:.)")


def get_tokenizer(directory: Path | str | None = None) -> RustBPETokenizer:
    """The trained tokenizer of a folder, by default <base dir>/tokenizer."""
    tokenizer = RustBPETokenizer.from_directory(directory or get_base_dir() / "tokenizer")
    assert isinstance(tokenizer, RustBPETokenizer)
    return tokenizer


def get_token_bytes(
    device: torch.device | str = "cpu", directory: Path | str | None = None
) -> torch.Tensor:
    """(vocab_size,) int32: the UTF-8 bytes of each token, 0 for special tokens.

    From raw bytes: a token that is not valid UTF-8 by itself still counts all of its bytes.
    """
    lengths = [len(token or b"") for token in get_tokenizer(directory).token_bytes()]
    return torch.tensor(lengths, dtype=torch.int32, device=device)
