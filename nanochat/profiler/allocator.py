"""What the CUDA allocator did: a snapshot that https://pytorch.org/memory_viz draws.

    with allocator_history(Path("memory.pickle")):
        train_step(...)

Not measured: this needs a GPU.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MAX_EVENTS = 100_000  # the newest are kept: a step of d20 has some thousands


@contextlib.contextmanager
def allocator_history(path: Path) -> Iterator[None]:
    """Within the block, record every allocation with its Python stack; at its end write `path`.

    The file is written however the block ends. Out of memory it is what one needs: everything that
    was alive, and the allocation that did not fit.
    Raises  ValueError without a CUDA device: `measure_memory` counts without one.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"no CUDA device whose allocator could be recorded in {path}; the memory of a step is "
            "counted without one by python -m scripts.plan --count"
        )
    # C++ stacks, the default, take minutes to look up when the snapshot is written
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=MAX_EVENTS)
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"out of memory: the allocator's history goes to {path}", file=sys.stderr, flush=True)
        raise
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
