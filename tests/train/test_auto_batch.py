"""--device_batch_size=auto: what fits is foreseen, tried, and halved once where it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import configurator
from nanochat.common import setup_training
from nanochat.gpt import GPT
from nanochat.profiler.activations import Setup
from nanochat.profiler.footprint import footprint
from nanochat.profiler.plan import HEADROOM, Run
from nanochat.settings import AUTO
from nanochat.train import auto_batch
from nanochat.train.run import model_config
from scripts import base_train, chat_rl, chat_sft, mid_train
from tests.support.runs import ROWS, SEQUENCE_LEN, TINY, losses, make_base_dir, records, run_here

TOKENS = 4 * ROWS * SEQUENCE_LEN  # of a step: 8 rows


def train(base_dir: Path, *more: str, tag: str) -> str:
    command = "python -m scripts.base_train --num_iterations=2 --kernels=reference"
    data = f"--data_dir={base_dir / 'text'}"
    total = f"--total_batch_size={TOKENS}"
    return run_here(base_dir, command, *TINY, data, total, f"--model_tag={tag}", *more)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_dir(tmp_path_factory.mktemp("auto"))


def test_auto_is_a_word_of_the_command_line_and_of_configs(tmp_path: Path) -> None:
    for script in (base_train, mid_train, chat_sft):
        assert (
            configurator.load(script.Settings, ["--device_batch_size=auto"]).device_batch_size
            == AUTO
        )
    path = tmp_path / "auto.py"
    path.write_text('device_batch_size = "auto"')
    assert configurator.load(base_train.Settings, [str(path)]).device_batch_size == AUTO
    for wrong in ("--device_batch_size=0", "--device_batch_size=automatic"):
        with pytest.raises(SystemExit):
            configurator.load(base_train.Settings, [wrong])
    with pytest.raises(SystemExit):  # its batches are answers that are sampled as well
        configurator.load(chat_rl.Settings, ["--device_batch_size=auto"])


def test_what_fits_is_chosen_and_changes_nothing_else(corpus: Path) -> None:
    """A whole step of 8 rows fits this machine: the run is that of --device_batch_size=8."""
    said = train(corpus, "--device_batch_size=auto", tag="auto")
    assert "device_batch_size=auto: 8 (forecast: " in said
    assert "half of what is free; a whole step)" in said
    train(corpus, "--device_batch_size=8", tag="eight")
    folders = [corpus / "base_checkpoints" / tag for tag in ("auto", "eight")]
    assert losses(folders[0]) == losses(folders[1])
    (plan,) = records(folders[0], "plan")
    assert (plan["device_batch_size"], plan["accumulation_steps"]) == (8, 1)


def test_memory_that_runs_out_is_met_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GPT.forward

    def small(self: GPT, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(idx) > 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", small)
    said = train(corpus, "--device_batch_size=auto", tag="small")
    assert "8 ran out of memory; continuing with 4 and 2 micro-batches a step" in said
    (plan,) = records(corpus / "base_checkpoints" / "small", "plan")
    assert (plan["device_batch_size"], plan["accumulation_steps"]) == (4, 2)
    assert plan["total_batch_size"] == TOKENS


def test_the_batch_follows_what_is_free(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    runtime = setup_training("cpu")
    run = Run(Setup(model_config(4, -1, 256, 8192), 1, {}, itemsize=4), 64 * 256, 1)
    held = HEADROOM * sum(footprint(run.setup).steady.values())
    for batch in (1, 4, 64):
        needed = HEADROOM * footprint(run.with_batch(batch)).total - held
        monkeypatch.setattr(auto_batch, "free_bytes", lambda runtime, n=needed: n * 1.001)
        assert auto_batch.foreseen(run, runtime) == batch
    monkeypatch.setattr(auto_batch, "free_bytes", lambda runtime: 0)
    assert auto_batch.foreseen(run, runtime) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert "8 would take" in said[1]


def test_free_memory_is_shared_by_the_ranks() -> None:
    import psutil

    free = auto_batch.free_bytes(setup_training("cpu"))
    assert 0 < free < psutil.virtual_memory().total / 2
