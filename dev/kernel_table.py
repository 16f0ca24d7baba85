"""The table of operations in docs/kernels.md, from what the operations register.

python -m dev.kernel_table            prints the table
python -m dev.kernel_table --write    puts it into docs/kernels.md
"""

from dev import generated
from nanochat import report
from nanochat.kernels.registry import operations


def table() -> str:
    """Operations in alphabetical order, their implementations in the order of registration."""
    rows = []
    for name, op in sorted(operations().items()):
        names = ", ".join(f"`{n}`" for n in op.implementations if n != "reference")
        rows.append((f"`{name}`", names, op.summary))
    return report.table(("operation", "implementations", "what they save"), rows)


PARTS = [generated.Part("dev.kernel_table", generated.ROOT / "docs" / "kernels.md", table)]

if __name__ == "__main__":
    generated.main(PARTS)
