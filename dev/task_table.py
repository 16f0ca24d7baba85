"""The table of tasks in docs/adding_a_task.md, from what the tasks declare.

python -m dev.task_table            prints the table
python -m dev.task_table --write    puts it into docs/adding_a_task.md
"""

from dev import generated
from nanochat import report
from tasks import registry

COLUMNS = ("task", "file", "answers", "splits", "guessing", "ChatCORE", "reward", "rows")


def table() -> str:
    """Every task in the order of the registry."""
    rows = []
    for name, entry in registry.entries().items():
        source = "made by the code"
        if entry.source is not None:
            folders = ", ".join(f"`{place}/`" for place in entry.source.places)
            source = f"{folders}: {', '.join(entry.source.columns)}"
        rows.append((
            name,
            f"`{entry.task.__module__.replace('.', '/')}.py`",
            "training only" if entry.task.eval_type == "none" else entry.task.eval_type,
            ", ".join(entry.splits),
            entry.guessing,
            "yes" if entry.in_chatcore else "",
            "yes" if entry.has_reward else "",
            source,
        ))  # fmt: skip
    return report.table(COLUMNS, rows)


PARTS = [generated.Part("dev.task_table", generated.ROOT / "docs" / "adding_a_task.md", table)]

if __name__ == "__main__":
    generated.main(PARTS)
