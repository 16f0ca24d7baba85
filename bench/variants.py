"""Which optimizer steps are measured: sizes of models, and kernels chosen for them."""

from dataclasses import dataclass, field
from typing import Any

from bench.contenders import COMPILE, EAGER, OURS
from bench.rows import TIMED
from nanochat import gpt
from nanochat.kernels.registry import operations
from nanochat.optim import adamw, muon

BASELINE, BASE_SPEC = "sdpa", "reference,attention=sdpa"  # references and torch's own attention


@dataclass(frozen=True)
class Size:
    """A model and a step of `sequences` sequences."""

    name: str
    depth: int
    sequences: int = 32
    length: int = 2048
    vocab_size: int = 65_536

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


SIZES = {size.name: size for size in (Size("d12", 12), Size("d20", 20))}
SMALL = Size("cpu-small", 2, 4, 64, 1024)


@dataclass
class Variant:
    """A choice of kernels, and whether the model is compiled.

    status  "missing" once it cannot be chosen here, "refused" once it fails or is wrong; `reason`
    """

    name: str
    spec: str
    role: str = OURS
    compiled: bool = False
    choices: dict[str, str] = field(default_factory=dict)
    model: Any = None
    micro_batch: int = 0  # sequences
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    status: str = TIMED
    reason: str = ""

    def out(self, status: str, reason: str) -> None:
        """Measure it no more."""
        self.status, self.reason = status, reason


def eager_variants() -> list[Variant]:
    """References, the baseline, every implementation alone on top of it, and `auto`."""
    in_model = {id(x) for module in (gpt, adamw, muon) for x in vars(module).values()}
    alone = [
        f"{op.name}={name}"
        for op in operations().values()
        if id(op) in in_model
        for name in op.implementations
        if name != "reference" and f"{op.name}={name}" not in BASE_SPEC
    ]
    return [
        Variant(BASELINE, BASE_SPEC, EAGER),
        Variant("auto", "auto"),
        *(Variant(choice, f"{BASE_SPEC},{choice}") for choice in alone),
        Variant("reference", "reference", "reference"),
    ]


def compiled_variants() -> list[Variant]:
    """The baseline again, it and `auto` compiled."""
    return [
        Variant(f"{BASELINE}, again", BASE_SPEC, EAGER),
        Variant("auto, compile", "auto", compiled=True),
        Variant("compile", BASE_SPEC, COMPILE, compiled=True),
    ]
