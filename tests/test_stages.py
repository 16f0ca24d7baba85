"""Stages stand in one table; everything that names them asks it."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import report, stages
from nanochat.configurator import load
from nanochat.stages import Stage
from nanochat.train import checkpoint_read
from scripts import chat_cli

ROOT = Path(__file__).resolve().parent.parent
PLANTED = Stage(
    "chatdpo",
    source="dpo",
    script="chat_dpo",
    title="Preference optimization",
    chat_title="Chat evaluation after preference optimization",
    parents=("chatsft",),
    parent_flag="sft_checkpoint",
)


def undocumented(text: str) -> list[str]:
    """Stages whose command or folder the table of the pipeline's overview lacks."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [
        stage.name
        for stage in stages.STAGES
        if not any(f"scripts.{stage.script}`" in r and f"`{stage.folder}/" in r for r in rows)
    ]


def overview() -> str:
    return (ROOT / "docs" / "pipeline_overview.md").read_text(encoding="utf-8")


def test_every_stage_is_whole():
    known = stages.names()
    for index, stage in enumerate(stages.STAGES):
        assert set(stage.parents) <= set(known[:index]), "a stage comes after its parents"
        assert bool(stage.parents) == bool(stage.parent_flag)
        assert (ROOT / "scripts" / f"{stage.script}.py").is_file()
    assert len({stage.source for stage in stages.STAGES}) == len(known) == len(set(known))


def test_the_overview_names_every_stage():
    assert undocumented(overview()) == []


def test_a_planted_stage_is_found_everywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "STAGES", [*stages.STAGES, PLANTED])
    assert checkpoint_read.stage_dir(tmp_path, "chatdpo") == tmp_path / "chatdpo_checkpoints"
    assert stages.of_checkpoint("dpo", "").name == "chatdpo"
    assert stages.of_checkpoint("sft", "chatdpo_checkpoints/d4/000002").name == "chatdpo"
    assert load(chat_cli.Settings, ["--source=dpo"]).source == "dpo"
    rows = stages.shell_rows()
    assert rows[-1] == "chatdpo chat_dpo chatdpo_checkpoints sft_checkpoint - chat_eval_dpo -"
    assert undocumented(overview()) == ["chatdpo"]
    accuracy = {"kind": "task", "step": 1, "task": "GSM8K", "accuracy": 0.5}
    summary = report._summary({"chat_eval_dpo": [accuracy]})
    assert "| BASE | MID | SFT | RL | DPO |" in summary
    assert "| GSM8K | - | - | - | - | 0.5 |" in summary
    assert "Preference optimization" in report._header({})


def test_without_the_row_nothing_knows_it(tmp_path):
    with pytest.raises(ValueError, match="stage 'chatdpo' is unknown; choose base, mid"):
        checkpoint_read.stage_dir(tmp_path, "chatdpo")
    with pytest.raises(ValueError, match="source 'dpo' is unknown"):
        stages.of_checkpoint("dpo", "")
    with pytest.raises(SystemExit):
        load(chat_cli.Settings, ["--source=dpo"])


def test_the_shell_reads_the_same_table():
    line = [sys.executable, "-m", "nanochat.stages"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == stages.shell_rows()
    shell = (ROOT / "dev" / "stages.sh").read_text(encoding="utf-8")
    named = [name for name in ("chatsft", "chatrl", "mid_train", "chat_sft") if name in shell]
    assert named == [], "stages.sh names a stage of its own"


@pytest.mark.parametrize("stage", stages.STAGES, ids=lambda stage: stage.name)
def test_the_script_of_a_stage_opens_that_stage(stage):
    """Its checkpoints go where the table says, and its flag for the parent exists."""
    module = __import__(f"scripts.{stage.script}", fromlist=["Settings"])
    if stage.parent_flag:
        assert hasattr(module.Settings(), stage.parent_flag)
    source = (ROOT / "scripts" / f"{stage.script}.py").read_text(encoding="utf-8")
    assert f'Session(\n        "{stage.name}",' in source
