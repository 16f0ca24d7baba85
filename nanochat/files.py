"""Reading files that people wrote: JSON lines that say where they are wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
