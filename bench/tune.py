"""Measure kernel configurations on this GPU and write the fastest into its table.

    python -m bench.tune [--op rms_norm relu2_mlp] [--workloads d12 d20 d32] [--seconds 30]

For each kernel of nanochat/kernels/configs and each size the workloads ask of it: the shipped
configuration and its neighbours, nearest first, until the seconds of that kernel and size are
spent. A candidate counts if it compiles and passes the check of bench/cases.py. The fastest must
also pass the gate of nanochat/kernels/aot.py, then beat the shipped one once more, turn by turn.
Shipped entries stay behind the measured ones, for other dtypes and larger sizes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.configurations import write_entry
from bench.measure import timer_for
from bench.tuner import Tuner, tasks
from nanochat.common import setup_training
from nanochat.kernels.launch import CONFIGS, architecture_of
from nanochat.kernels.registry import operations
from nanochat.kernels.workloads import WORKLOADS

LOG = "tune_log.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--op", nargs="*", choices=operations(), default=[], help="all")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each kernel and size")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder of the table")
    parser.add_argument("--log", type=Path, help=f"folder of {LOG}; none is written without it")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.tune measures on a GPU, and torch finds none on this machine")
    runtime = setup_training("cuda")
    device, dtype = runtime.device, runtime.dtype
    tuner = Tuner(architecture_of(device), device, dtype, timer_for(device))
    ops = [operations()[name] for name in arguments.op or operations()]
    workloads = [WORKLOADS[name] for name in arguments.workloads]
    major, minor = torch.cuda.get_device_capability(device)
    for task in tasks(ops, workloads, tuner.architecture, dtype):
        kernel = task.use.config.kernel
        entry = tuner.tune(task, arguments.seconds)
        print(
            f"{kernel} {task.use.size}: {entry['origin'] if entry else 'as it was'}",
            flush=True,
        )
        if entry:
            write_entry(arguments.output, f"sm_{major}{minor}", kernel, entry)
        if arguments.log:
            (arguments.log / LOG).write_text(json.dumps(tuner.log, indent=1) + "\n")


if __name__ == "__main__":
    main()
