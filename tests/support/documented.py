"""Files and commands that docs/adding_a_task.md shows."""

import re
from pathlib import Path

from tests.support.runs import ROOT


def section() -> str:
    """The section "A task without code"."""
    page = (ROOT / "docs" / "adding_a_task.md").read_text(encoding="utf-8")
    return page.partition("## A task without code\n")[2].partition("\n## ")[0]


def documented_files(folder: Path) -> list[str]:
    """Write every file that the section shows; their names."""
    shown = re.findall(r"`([\w.]+)`[^\n`]*:\n\n```\w+\n(.*?)^```$", section(), re.M | re.S)
    for name, text in shown:
        (folder / name).write_text(text, encoding="utf-8")
    assert len(shown) == 7, "the files are not found any more"
    return [name for name, _ in shown]


def documented_commands() -> list[str]:
    """Every command of the section."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", section(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]
