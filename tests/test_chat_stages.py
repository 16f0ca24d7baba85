"""Mid-training and fine-tuning from the command line: from checkpoint to checkpoint, resumed."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanochat.tokenizer import RustBPETokenizer

ROOT = Path(__file__).parent.parent
WORDS = ("the", "letter", "count", "spell", "word", "user", "answer", "how", "many", "is", "in")
COMMON = ("--device=cpu", "--device_batch_size=2", "--num_iterations=6", "--save_every=2")
BASE = (
    "--depth=2",
    "--max_seq_len=128",
    "--total_batch_size=512",
    "--eval_tokens=512",
    "--sample_every=-1",
)
MID = ("--mixture=local", "--total_batch_size=512", "--eval_tokens=512", "--keep_last=0")
SFT = ("--mixture=local", "--target_examples_per_step=4", "--eval_steps=2", "--keep_last=0")


@dataclass(frozen=True)
class World:
    """A base directory with a trained base model."""

    base_dir: Path

    def run(self, script: str, *arguments: str, ranks: int = 1, code: int = 0) -> str:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        result = subprocess.run(
            [*launcher, str(ROOT / "scripts" / f"{script}.py"), *COMMON, *arguments],
            env=os.environ
            | {
                "NANOCHAT_BASE_DIR": str(self.base_dir),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert result.returncode == code, result.stdout
        return result.stdout

    def weights(self, stage: str, tag: str, step: int = 6) -> dict[str, torch.Tensor]:
        folder = self.base_dir / f"{stage}_checkpoints" / tag / f"{step:06d}"
        return torch.load(folder / "model.pt", weights_only=True)

    def records(self, stage: str, tag: str, kind: str) -> list[dict]:
        path = self.base_dir / f"{stage}_checkpoints" / tag / "metrics.jsonl"
        return [r for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base_dir = tmp_path_factory.mktemp("world")
    chooser = random.Random(0)
    (base_dir / "text").mkdir()
    documents = [" ".join(chooser.choices(WORDS, k=120)) + "." for _ in range(100)]
    (base_dir / "text" / "a.jsonl").write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in documents)
    )
    RustBPETokenizer.train_from_iterator(documents, 290).save(base_dir / "tokenizer")
    world = World(base_dir)
    world.run("base_train", *BASE, f"--data_dir={base_dir / 'text'}")
    return world


@pytest.fixture(scope="module")
def mid(world: World) -> World:
    world.run("mid_train", *MID, "--base_checkpoint=base_checkpoints/latest.pt")
    return world


@pytest.fixture(scope="module")
def sft(mid: World) -> World:
    mid.run("chat_sft", *SFT, "--mid_checkpoint=mid_checkpoints/latest.pt")
    return mid


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_mid_training_goes_on_from_the_base_model(mid: World) -> None:
    losses = [record["loss"] for record in mid.records("mid", "d2", "train")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    bpb = [record["bpb"] for record in mid.records("mid", "d2", "eval")]
    assert bpb[-1] < bpb[0]
    meta = json.loads((mid.base_dir / "mid_checkpoints/d2/000006/meta.json").read_text())
    assert meta["parent"].endswith("base_checkpoints/d2/000006")


def test_fine_tuning_goes_on_from_mid_training(sft: World) -> None:
    before = sft.records("chatsft", "d2", "eval")[0]["loss"]
    after = sft.records("chatsft", "d2", "eval")[-1]["loss"]
    assert after < before
    rates = [record["lr_scale"] for record in sft.records("chatsft", "d2", "train")]
    assert rates == [pytest.approx(1 - step / 6) for step in range(6)]


def test_mid_training_resumes_bit_for_bit(mid: World) -> None:
    step = mid.base_dir / "mid_checkpoints" / "d2" / "000002"
    mid.run("mid_train", *MID, f"--resume_from={step}", "--model_tag=again")
    assert_same(mid.weights("mid", "d2"), mid.weights("mid", "again"))


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_fine_tuning_resumes_bit_for_bit(sft: World, packing: str) -> None:
    tag = "d2"
    if packing == "packed":
        tag = "packed"
        sft.run("chat_sft", *SFT, "--packing=packed", f"--model_tag={tag}")
    step = sft.base_dir / "chatsft_checkpoints" / tag / "000004"
    again = (f"--packing={packing}", f"--resume_from={step}", f"--model_tag={tag}again")
    sft.run("chat_sft", *SFT, *again)
    assert_same(sft.weights("chatsft", tag), sft.weights("chatsft", f"{tag}again"))


def test_two_ranks_learn_what_one_learns(sft: World) -> None:
    """Two ranks of one row a step see the rows that one rank of two rows sees."""
    ranked = ("--device_batch_size=1", "--model_tag=ranked")
    sft.run("chat_sft", *SFT, *ranked, ranks=2)
    want = [record["loss"] for record in sft.records("chatsft", "d2", "train")]
    got = [record["loss"] for record in sft.records("chatsft", "ranked", "train")]
    assert got == pytest.approx(want, rel=2e-3)


def test_a_checkpoint_of_another_stage_is_refused(mid: World) -> None:
    wrong = f"--mid_checkpoint={mid.base_dir / 'base_checkpoints' / 'd2' / '000006'}"
    output = mid.run("chat_sft", *SFT, wrong, "--model_tag=wrong", code=1)
    assert "is of stage base, not mid" in output
