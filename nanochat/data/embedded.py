"""A corpus of real text that needs no download: what the running Python comes with.

Documentation topics, the standard library, and the sources and documentation of the installed
packages: text files only, without duplicates, in a fixed order, cut to documents of 1 to 8 KB.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
LEAST_CHARS = 1_000
MOST_CHARS = 8_000  # about half a training step of the small run, so that a step mixes documents
LEAST_LETTERS = 0.65  # share of letters and spaces below which a text is a table of data
MOST_LINE_CHARS = 400  # longer lines are data or generated code
TOTAL_CHARS = 40_000_000  # a few seconds to write, minutes to train on


def collect(total_chars: int = TOTAL_CHARS) -> list[str]:
    """Documents of about total_chars characters in all, the same on every call."""
    seen: set[bytes] = set()
    keyed: list[tuple[bytes, str]] = []
    chars = 0
    for document in _documents():
        digest = hashlib.sha256(document.encode()).digest()
        if digest in seen or _is_data(document):
            continue
        seen.add(digest)
        keyed.append((digest, document))
        chars += len(document)
        if chars >= total_chars:
            break
    # by content hash: a fixed order in which neighbouring files, which are alike, lie apart
    return [document for _, document in sorted(keyed)]


def split_lines(text: str, most: int = MOST_CHARS) -> Iterator[str]:
    """Pieces of at most `most` characters, cut between lines; a longer line is a piece."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if piece and size + len(line) > most:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)


def _documents() -> Iterator[str]:
    for _, topic in sorted(topics.topics.items()):
        yield from _pieces(topic)
    paths = sysconfig.get_paths()
    stdlib, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    for root in (stdlib, packages):
        for path in sorted(root.rglob("*")):
            if root is stdlib and "site-packages" in path.parts:
                continue  # of another environment than this one
            if path.suffix in SUFFIXES and path.is_file():
                yield from _pieces(_read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""  # not text, or not ours to read


def _pieces(text: str) -> Iterator[str]:
    if max(map(len, text.splitlines()), default=0) > MOST_LINE_CHARS:
        return
    yield from (piece for piece in split_lines(text) if len(piece) >= LEAST_CHARS)


def _is_data(text: str) -> bool:
    letters = sum(char.isalpha() or char.isspace() for char in text)
    return letters < LEAST_LETTERS * len(text)
