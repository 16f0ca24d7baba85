"""Rows that people wrote or the Hub has, whatever their columns: JSONL, JSON, CSV, parquet.

Every row comes with the place it is from, so that what is wrong with it can be said:

    my_task.jsonl:3    my_task.json: row 3    my_task.csv:4    my_task.parquet: row 3
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.files import read_json_lines
from tasks.rows import ParquetRows, Row, Rows
from tasks.sources import Source

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB = re.compile(
    r"hub:(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(?:@(?P<revision>[\w.-]+))?"
    r"(?::(?P<folder>[\w./-]+?))?(?::(?P<split>[\w.-]+))?"
)
FILE_OF_PROBLEMS = "a file of problems"
HUB_FORM = "hub:owner/name[@revision][:folder[:split]], such as hub:someone/riddles:data:test"
Placed = tuple[str, Row]


def names_rows(name: str) -> bool:
    """Whether this is the name of a file of rows, or of a data set of the Hub."""
    return name.startswith("hub:") or Path(name).suffix in SUFFIXES


def short_name(name: str) -> str:
    """What records call it: a file's stem; of a data set, its name, and folder and split if named.

    >>> short_name("data/my_task.jsonl"), short_name("hub:someone/riddles:hard:test")
    ('my_task', 'riddles-hard-test')
    """
    if not name.startswith("hub:"):
        return Path(name).stem
    found = hub_parts(name)
    parts = (found["name"], *(found[part] for part in ("folder", "split") if found[part]))
    return "-".join(parts).replace("/", "-")


def hub_parts(name: str) -> dict[str, str]:
    """The parts of a data set's name, "" for those left out. Raises ValueError for another form."""
    match = HUB.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no data set of the Hub; write {HUB_FORM}")
    return match.groupdict("")


def placed_rows(name: str) -> list[Placed]:
    """(place, row) of every row.

    Raises  ValueError for a missing file, one that cannot be read, or one without rows.
    """
    if name.startswith("hub:"):
        rows = list(_numbered(name, _of_hub(name)))
    else:
        path = Path(name).expanduser()
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{name}: rows are in a file {', '.join(SUFFIXES)}, or in {HUB_FORM}")
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name one that is, or {HUB_FORM}")
        readers = {".jsonl": read_json_lines, ".json": _of_json, ".csv": _of_csv}
        reader = readers.get(path.suffix, lambda path: _numbered(path, ParquetRows([path], ())))
        rows = list(reader(path))
    if not rows:
        raise ValueError(f"{name} has no rows; write one for each problem")
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{place}: {row!r:.60} is no row; write an object such as "
                '{"question": "What is 2+2?", "answer": "4"}'
            )
    return rows


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ValueError naming file and line."""
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); save it as UTF-8") from error


def _of_hub(name: str) -> Rows:
    """Downloaded as the rows of every task are; a revision that is there is not asked for again."""
    parts = hub_parts(name)
    owner, repository, revision = parts["owner"], parts["name"], parts["revision"] or "main"
    folder, split = parts["folder"] or "data", parts["split"] or "test"
    place = f"{owner}--{repository}@{revision}/{folder}"
    source = Source(f"{owner}/{repository}", revision, (place,), (split,), ())
    return source.load(split)


def _numbered(name: object, rows: Rows) -> Iterator[Placed]:
    return ((f"{name}: row {index + 1}", rows[index]) for index in range(len(rows)))


def _of_json(path: Path) -> Iterator[Placed]:
    """A list of rows, or an object one of whose values is that list."""
    value = read_json(path)
    lists = [value]
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError(
            f"{path}: {len(lists) if isinstance(value, dict) else 'no'} lists of rows; "
            'write a list of objects, or a description with "rows" (docs/adding_a_task.md)'
        )
    return _numbered(path, lists[0])


def _of_csv(path: Path) -> Iterator[Placed]:
    """The first line names the columns."""
    # with utf-8-sig the mark that spreadsheets put before the first name is no part of it
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if len(set(names)) < len(names):
                raise ValueError(f"two columns have one name among {names}; rename one")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"the row that ends in line {reader.line_num} has not {len(names)} cells "
                        f"({', '.join(names)}); put quotes around a cell that has a comma"
                    )
                yield place, row
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from error
