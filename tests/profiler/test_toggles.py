"""Which choices of kernels the matrix has, and that each is measured under its own kernels."""

from collections.abc import Iterator

import pytest
import torch

from nanochat.kernels.registry import operations
from nanochat.profiler import toggles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {op: op.selected for op in operations().values()}
    yield
    for op, name in before.items():
        op.use(name)


def all_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where every implementation of these two operations runs."""
    for name in ("rms_norm", "newton_schulz"):
        op = operations()[name]
        usable = {
            key: type(i)(i.name, i.call, lambda *_: "", lambda *_: "")
            for key, i in op.implementations.items()
        }
        monkeypatch.setattr(op, "implementations", usable)


def test_alone_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    all_usable(monkeypatch)
    chosen = {"rms_norm": "triton", "newton_schulz": "triton"}
    found, absent = toggles.matrix(chosen, chosen, CPU, torch.float32, "")
    assert not absent
    assert [(t.name, *t.kernels.values(), t.compiled) for t in found] == [
        ("all off", "reference", "reference", False),
        ("rms_norm=triton = all on, no newton_schulz", "triton", "reference", False),
        ("newton_schulz=triton_gram", "reference", "triton_gram", False),
        ("newton_schulz=triton = all on, no rms_norm", "reference", "triton", False),
        ("all on", "triton", "triton", False),
        ("compile", "reference", "reference", True),
        ("all on, compile", "triton", "triton", True),
    ]


class Imaginary:
    """A step whose loss and time are known for every choice of kernels."""

    def __init__(self) -> None:
        self.trained, self.order = 0, []

    def reset(self) -> None:
        self.trained = 0

    def step(self, compiled: bool) -> tuple[float, float]:
        self.trained += 1
        kernel = operations()["rms_norm"].selected
        self.order.append((kernel, compiled))
        fault = 0.5 if kernel == "triton" else 0.0
        return 4.0 - self.trained + fault, 1.0 / (2 if compiled else 1) + self.trained / 100

    def peak_bytes(self, compiled: bool) -> int | None:
        return None if compiled else 2**20


def test_each_is_measured_under_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    all_usable(monkeypatch)
    chosen = {"rms_norm": "triton"}
    found, _ = toggles.matrix(chosen, chosen, CPU, torch.float32, "")
    subject = Imaginary()
    toggles.measure(found, subject, rounds=2)
    record = toggles.record(found, {"attention=fa3": "no GPU"}, "A device", "float32")
    off, on, compiled, both = record["toggles"]
    # all losses are of the third step from the same weights; the faulty kernel shows
    assert off["loss"] == 1.0
    assert [row["loss_difference"] for row in record["toggles"]] == [0, 0.5, 0, 0.5]
    assert on["name"] == "rms_norm=triton = all on"
    assert compiled["peak_bytes"] is None
    assert both["steps"] == 2 * toggles.TIMED
    # 3 steps each for the losses, then turns of 3 steps; the second round begins with another
    turns = subject.order[4 * 3 :: 3]
    assert turns == [
        *[("reference", False), ("triton", False), ("reference", True), ("triton", True)],
        *[("triton", False), ("reference", True), ("triton", True), ("reference", False)],
    ]
    assert subject.trained == 0
    matrix, missing = toggles.tables(record)
    assert matrix.rows[0][3:] == ("1.00 x", "1.0 MiB", "+0.0e+00")
    assert matrix.rows[2][3:] == (f"{off['seconds'] / compiled['seconds']:.2f} x", "not known",
                                  "+0.0e+00")  # fmt: skip
    assert missing.rows == [("attention=fa3", "no GPU")]


def test_called() -> None:
    ops = operations()
    found = toggles.called(lambda: ops["rms_norm"](torch.ones(1, 8)))
    assert found == ["rms_norm"]
