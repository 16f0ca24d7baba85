"""The number format in which a model's linear layers multiply, by name.

"plain" is the compute dtype of the run. Any other name is a plug-in: a folder experiments/NAME with
a module precision.py that has

    prepare(model, runtime, options) -> Precision    before the optimizers and torch.compile
    accept_weights(model, description) -> None       before the weights of a quantized checkpoint

This is the one place where nanochat reaches up to experiments/, against the rule that a module
imports its own floor or below. It may do so because it knows no experiment: the only module it
loads is experiments.NAME.precision, only when a flag or a checkpoint gives that NAME, and only
through the two functions above. Without the folder everything plain still works.
tests/test_architecture.py holds both sides to it.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.settings import near_miss

PLAIN = "plain"
OPTION = "mx_"  # how settings begin that only an experiment takes
EXPERIMENTS = "experiments"
QUANTIZED = "quantized_weights"  # in the meta of a checkpoint: {"precision": NAME, ...}


class Precision:
    """What a training loop needs of it; this one leaves every product in the compute dtype.

    record    plain values for checkpoints and metrics: what every product runs in.
    emulated  whether products are computed in a stand-in for the format: the losses are those of
              the format, the time is not, so no run may present it as a speed.
    """

    emulated = False

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"name": PLAIN}

    def begin_step(self, step: int) -> None:
        """Draw whatever is random in this step: a resumed run draws the same. Here nothing is."""


def prepare(name: str, model: GPT, runtime: Runtime, settings: Mapping[str, Any]) -> Precision:
    """Make the model multiply as `name` says; its parameters and their names stay.

    settings  of the script: those called mx_... are options of an experiment, empty ones its
              defaults; the others are ignored.
    Raises    ValueError for an unknown name, and for options where nothing takes them.
    """
    options = {key: value for key, value in settings.items() if key.startswith(OPTION)}
    if name != PLAIN:
        return _experiment(name).prepare(model, runtime, options)
    given = [flag for flag, value in options.items() if value]
    if given:
        raise ValueError(
            f"--{given[0]}={options[given[0]]} means nothing with --precision={PLAIN}; choose "
            f"--precision={' or '.join(_names())}, or leave it out"
        )
    return Precision()


def accept_weights(model: GPT, meta: Mapping[str, Any]) -> None:
    """Make room in the model for the weights of a checkpoint, if its meta says they are quantized.

    Raises  ValueError for a precision that is not here.
    """
    description = meta.get(QUANTIZED)
    if description is not None:
        _experiment(description["precision"]).accept_weights(model, description)


def _names() -> list[str]:
    """Experiments with a precision.py; none where only the package nanochat is installed."""
    try:
        package = importlib.import_module(EXPERIMENTS)
    except ModuleNotFoundError:
        return []
    files = (file for folder in package.__path__ for file in Path(folder).glob("*/precision.py"))
    return sorted(file.parent.name for file in files)


def _experiment(name: str) -> ModuleType:
    names = _names()
    if name not in names:
        raise ValueError(
            f"precision {name!r} is unknown{near_miss(name, [PLAIN, *names])}; all but {PLAIN} "
            f"are folders of {EXPERIMENTS}/ in a checkout"
        )
    return importlib.import_module(f"{EXPERIMENTS}.{name}.precision")
