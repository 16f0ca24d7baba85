"""report.md holds what the records hold, and no more."""

import json
from pathlib import Path

import pytest
import torch

from nanochat import report
from nanochat.common import Runtime
from nanochat.tracking import Tracker


def runtime() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, 0, 0, 1, 0, Path())


def write_base_run(base_dir: Path, tag: str = "d4", least_bpb: float = 1.5) -> None:
    tracker = Tracker(base_dir / "base_checkpoints" / tag, runtime(), "base", {"depth": 4})
    tracker.log(
        "plan", 0, depth=4, num_params=36_700_160, num_iterations=20, total_batch_size=1000,
        flops_per_token_causal=2_000_000, flops_per_token_nanochat=3_000_000,
        kernels={"rms_norm": "reference"},
    )  # fmt: skip
    for step in range(20):
        if step % 10 == 0:
            tracker.log("eval", step, split="val", bpb=3.0 - step / 10)
        rate = 10.0 if step < 10 else 500.0 - step
        tracker.log(
            "train", step, loss=5.0 - step / 10, step_seconds=2.0, tokens_per_second=rate,
            mfu_causal=None, gemm_share_causal=0.25, memory_gib=1.0 + step / 100,
        )  # fmt: skip
    tracker.log("eval", 20, split="val", bpb=least_bpb)
    tracker.log("sample", 10, prompt="early", text="nothing")
    tracker.log("sample", 20, prompt="The capital", text="of | France\nis")
    tracker.log("end", 20, wall_seconds=120.0, peak_memory_gib=1.25, min_bpb=least_bpb)
    tracker.close()


def test_base_training_and_header(tmp_path):
    write_base_run(tmp_path)
    report.main(["generate", f"--base_dir={tmp_path}"])
    text = (tmp_path / "report/report.md").read_text()
    for row in (
        "| parameters | 36,700,160 |",
        "| training tokens | 20,000 |",
        "| training FLOPs, causal | 4e+10 |",
        "| tokens/s, median | 486 |",
        "| MFU against the datasheet, causal FLOPs | not known |",
        "| share of the measured GEMM rate, causal FLOPs | 25.0 % |",
        "| peak memory, GiB | 1.25 |",
        "| validation bpb, untrained | 3 |",
        "| validation bpb, least | 1.5 |",
        "| less than untrained | 50.0 % |",
        r"| The capital | of \| France is |",
        "| rms_norm | reference |",
        "| Base training | 2.0 |",
        f"| torch | {torch.__version__} |",
    ):
        assert row in text
    assert "early" not in text
    assert "MFU against the datasheet, nanochat" not in text
    assert "\nNot run: Tokenizer training, Tokenizer evaluation, Base loss" in text
    assert "## Midtraining" not in text
    assert (tmp_path / "report/base.png").read_bytes().startswith(b"\x89PNG")
    assert "![training loss, nats per token; validation bits per byte](base.png)" in text


def test_tokenizer_records_become_tables(tmp_path):
    tracker = Tracker(tmp_path / "tokenizer", runtime(), "tok_train", {})
    tracker.log("end", 0, vocab_size=65536, train_seconds=12.5)
    tracker.close()
    tracker = Tracker(tmp_path / "tokenizer", runtime(), "tok_eval", {})
    tracker.log("compression", 0, text="news", ours=4.5, gpt2=4.25, cl100k=None)
    tracker.log("compression", 0, text="code", ours=3.5, gpt2=2.25, cl100k=None)
    tracker.close()
    assert report.generate(tmp_path, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert "## Tokenizer training\n\n|  |  |\n|---|---|\n| vocab size | 65,536 |" in text
    assert "| text | ours | gpt2 | cl100k |" in text
    assert "| code | 3.5 | 2.25 | not known |" in text


def test_the_last_run_of_a_stage_counts(tmp_path):
    write_base_run(tmp_path, "d4", least_bpb=1.5)
    write_base_run(tmp_path, "d4", least_bpb=1.25)
    report.generate(tmp_path, tmp_path / "out.md")
    assert "| validation bpb, least | 1.25 |" in (tmp_path / "out.md").read_text()
    write_base_run(tmp_path, "d2", least_bpb=1.75)
    report.generate(tmp_path, tmp_path / "out.md")
    assert "| validation bpb, least | 1.75 |" in (tmp_path / "out.md").read_text()


def test_summary_has_a_column_for_every_model(tmp_path):
    write_base_run(tmp_path)
    for stage, accuracy in (("base", 0.25), ("mid", 0.5), ("rl", 0.75)):
        folder = tmp_path / f"{stage}_checkpoints" / "d4"
        tracker = Tracker(folder, runtime(), f"chat_eval_{stage}", {})
        tracker.log("task", 20, task="GSM8K", accuracy=accuracy, num_right=1)
        tracker.log("chatcore", 20, chatcore=accuracy / 2, tasks=["GSM8K"])
        tracker.close()
    tracker = Tracker(tmp_path / "base_checkpoints" / "d4", runtime(), "base_eval", {})
    tracker.log("core", 20, core=0.125)
    tracker.close()
    tracker = Tracker(tmp_path / "chatrl_checkpoints" / "d4", runtime(), "chatrl", {})
    for step in range(3):
        tracker.log("train", step, loss=0.1, reward=step / 2, length=30 - step)
    tracker.close()
    report.generate(tmp_path, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert (
        "## Summary\n\n|  | BASE | MID | SFT | RL |\n|---|---|---|---|---|\n"
        "| validation bpb | 1.5 | - | - | - |\n"
        "| CORE | 0.125 | - | - | - |\n"
        "| GSM8K | 0.25 | 0.5 | - | 0.75 |\n"
        "| ChatCORE | 0.125 | 0.25 | - | 0.375 |\n"
    ) in text
    assert "nats per token; mean reward; tokens of an answer, mean](chatrl.png)" in text


def test_odd_records_are_read_as_far_as_they_go(tmp_path):
    lines = [
        "not json",
        "[]",
        json.dumps({"kind": "train", "step": 1}),
        json.dumps({"kind": "train", "step": None, "loss": None, "stage": "odd"}),
        json.dumps({"kind": "eval", "step": 0, "bpb": None, "stage": "base", "time": "yesterday"}),
        json.dumps({"kind": "train", "step": 5, "loss": None, "stage": "base"}),
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines))
    assert report.generate(tmp_path, tmp_path / "out.md")
    assert "| tokens/s, median | not known |" in (tmp_path / "out.md").read_text()


def test_without_records_it_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="run a stage first"):
        report.main(["generate", "--base-dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_reset_removes_the_report_and_keeps_the_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    write_base_run(tmp_path)
    report.main(["generate"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report/report.md")
    report.main(["reset"])
    assert not (tmp_path / "report").exists()
    assert (tmp_path / "base_checkpoints/d4/metrics.jsonl").exists()
    report.main(["reset"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not known"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (4e19, "4e+19"),
        (True, "True"),
        ("a|b\nc", "a\\|b c"),
        (["a", 0.25], "a, 0.25"),
    ],
)
def test_number(value, text):
    assert report.number(value) == text
