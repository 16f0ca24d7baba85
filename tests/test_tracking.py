"""Records: strict JSON, one line each, continued without repeats, wandb only when asked for."""

import errno
import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.common import Runtime
from nanochat.tracking import DummyWandb, Tracker, environment, jsonable, read_records


@dataclass(frozen=True)
class Settings:
    depth: int = 4
    lr: float = math.inf


def runtime(rank: int = 0) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, rank, rank, 2, 0, Path())


def strict(line: str) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_line_is_strict_json_with_its_place(tmp_path):
    tracker = Tracker(tmp_path, runtime(), "base", Settings(), header={"kernels": {"op": "ref"}})
    tracker.log("train", 3, loss=torch.tensor(2.5), grad_norm=math.nan, lr=-math.inf, text="é\n")
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()  # not yet closed
    start, train = map(strict, lines)
    assert (start["kind"], start["stage"], start["step"]) == ("start", "base", 0)
    assert start["settings"] == {"depth": 4, "lr": None}
    assert start["kernels"] == {"op": "ref"}
    assert start["environment"]["torch"] == torch.__version__
    assert train["run"] == start["run"]
    values = {name: train[name] for name in ("kind", "step", "loss", "grad_norm", "lr", "text")}
    assert values == {
        "kind": "train", "step": 3, "loss": 2.5, "grad_norm": None, "lr": None, "text": "é\n",
    }  # fmt: skip
    tracker.close()


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(1.5), 1.5),
        (np.int64(3), 3),
        (np.float64("nan"), None),
        (torch.tensor([1.0, math.inf]), [1.0, None]),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.device("cpu"), "cpu"),
        (Path("a/b"), "a/b"),
        ((1, True, None), [1, True, None]),
        ({3, 1}, [1, 3]),
        ({1: {"a": math.nan}}, {"1": {"a": None}}),
        (Settings(lr=0.1), {"depth": 4, "lr": 0.1}),
    ],
)
def test_values_become_plain(value, plain):
    assert jsonable(value) == plain
    json.dumps(jsonable(value), allow_nan=False)


def test_other_ranks_are_silent(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", runtime(rank=1), "base", {}, run="named")
    tracker.log("train", 0, loss=1.0)
    tracker.message("hello")
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_message_reaches_the_console(tmp_path, capsys):
    tracker = Tracker(tmp_path, runtime(), "base", {})
    tracker.message("hello")
    tracker.close()
    assert capsys.readouterr().out == "hello\n"


def write_run(run_dir: Path, steps: range, resume_step: int | None = None) -> None:
    tracker = Tracker(run_dir, runtime(), "base", {}, resume_step=resume_step)
    for step in steps:
        if step % 2 == 0:
            tracker.log("eval", step, split="val", bpb=1 / (step + 1))
            for prompt in ("a", "b"):
                tracker.log("sample", step, prompt=prompt, text="x")
            for task in ("MMLU", "ARC-Easy"):
                tracker.log("task", step, task=task, accuracy=0.5)
        tracker.log("train", step, loss=float(step))
    tracker.log("end", steps.stop, wall_seconds=1.0)
    tracker.close()


@pytest.mark.parametrize("killed_after", [5, 7, 9])
def test_a_resumed_run_reads_as_an_uninterrupted_one(tmp_path, killed_after):
    write_run(tmp_path / "whole", range(10))
    write_run(tmp_path / "resumed", range(killed_after))
    with (tmp_path / "resumed/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the line a kill cut short
    write_run(tmp_path / "resumed", range(4, 10), resume_step=4)

    def content(name: str) -> list[tuple]:
        records = read_records(tmp_path / name / "metrics.jsonl")
        assert len({r["run"] for r in records}) == 1
        kinds = ("eval", "sample", "task", "train", "end")
        kept = [r for r in records if r["kind"] in kinds]
        return [
            tuple(r.get(k) for k in ("kind", "step", "prompt", "task", "loss", "bpb")) for r in kept
        ]

    assert sorted(content("resumed"), key=str) == sorted(content("whole"), key=str)
    for line in (tmp_path / "resumed/metrics.jsonl").read_text().splitlines():
        strict(line)


def test_what_differs_in_a_name_is_not_a_repetition(tmp_path):
    """A run killed between two tasks of one step logs the second when it is resumed."""
    tracker = Tracker(tmp_path, runtime(), "chatsft", {})
    tracker.log("task", 4, task="MMLU", accuracy=0.25)
    tracker.close()
    tracker = Tracker(tmp_path, runtime(), "chatsft", {}, resume_step=4)
    tracker.log("task", 4, task="MMLU", accuracy=0.25)
    tracker.log("task", 4, task="ARC-Easy", accuracy=0.5)
    tracker.close()
    tasks = [r["task"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "task"]
    assert tasks == ["MMLU", "ARC-Easy"]


def test_a_new_run_leaves_the_records_of_the_old_and_other_stages(tmp_path):
    write_run(tmp_path, range(2))
    Tracker(tmp_path, runtime(), "mid", {}).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"cut')
    write_run(tmp_path, range(2))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["stage"] for r in records if r["kind"] == "start"] == ["base", "mid", "base"]
    assert len({r["run"] for r in records}) == 3
    assert sum(r["kind"] == "train" for r in records) == 4
    write_run(tmp_path, range(1, 2), resume_step=1)
    assert sum(r["stage"] == "mid" for r in read_records(tmp_path / "metrics.jsonl")) == 1


def test_wandb_is_not_imported_for_a_dummy_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Tracker(tmp_path, runtime(), "base", {}).close()


def test_a_named_run_without_wandb_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--run=first .*uv sync --extra wandb"):
        Tracker(tmp_path / "run", runtime(), "base", {}, run="first")
    assert not (tmp_path / "run").exists()


def test_a_named_run_forwards_numbers_to_wandb(tmp_path, monkeypatch):
    logged, options = [], {}

    class Run(DummyWandb):
        def log(self, data, step=None):
            logged.append((dict(data), step))

    fake = types.ModuleType("wandb")
    fake.init = lambda **keywords: options.update(keywords) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Tracker(tmp_path, runtime(), "base", Settings(), run="first")
    tracker.log("train", 3, loss=2.0, text="words", grad_norm=math.nan)
    tracker.close()
    assert (options["project"], options["name"]) == ("nanochat", "first")
    assert logged == [({"train/loss": 2.0}, 3)]


def test_a_full_disk_names_the_file(tmp_path):
    def refuse(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = Tracker(tmp_path, runtime(), "base", {})
    file = tracker._file
    tracker._file = types.SimpleNamespace(write=refuse)
    with pytest.raises(OSError, match=r"cannot append to the records .*metrics\.jsonl"):
        tracker.log("train", 1, loss=1.0)
    tracker._file = file
    tracker.close()


def test_environment_is_plain_and_names_versions():
    record = environment()
    assert record["torch"] == torch.__version__
    assert record["triton"]
    assert set(record) >= {"commit", "dirty", "python", "cuda", "hardware"}
    json.dumps(record, allow_nan=False)
