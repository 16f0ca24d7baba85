"""Reading files that may be damaged: their digest, and JSON lines that say where they are wrong."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("<path>:<line>", value) of every line that is not blank.

    Raises  ValueError naming file and line of anything that is not JSON in UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error})") from error
                yield f"{path}:{number}", value
