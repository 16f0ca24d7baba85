"""Base training as people run it: from the command line, killed, resumed, stopped, two ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanochat.tokenizer import RustBPETokenizer

ROOT = Path(__file__).parent.parent
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "wizards",
    "brew",
)
SMALL = (
    "--device=cpu",
    "--depth=2",
    "--max_seq_len=32",
    "--device_batch_size=2",
    "--total_batch_size=128",
    "--num_iterations=12",
    "--eval_tokens=256",
    "--sample_every=-1",
    "--save_every=3",
    "--keep_last=0",
)


@dataclass(frozen=True)
class World:
    """A base directory with text and a tokenizer."""

    base_dir: Path

    def command(self, *arguments: str, ranks: int = 1) -> list[str]:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [*launcher, str(ROOT / "scripts" / "base_train.py"), *SMALL,
                f"--data_dir={self.base_dir / 'text'}", *arguments]  # fmt: skip

    def start(self, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
        environment = os.environ | {
            "NANOCHAT_BASE_DIR": str(self.base_dir),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            self.command(*arguments, ranks=ranks),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, ranks: int = 1, code: int = 0) -> str:
        output, _ = (process := self.start(*arguments, ranks=ranks)).communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def folder(self, tag: str) -> Path:
        return self.base_dir / "base_checkpoints" / tag

    def records(self, tag: str, kind: str) -> list[dict]:
        lines = (self.folder(tag) / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def losses(self, tag: str) -> list[float]:
        return [record["loss"] for record in self.records(tag, "train")]

    def weights(self, tag: str, step: int = 12) -> dict[str, torch.Tensor]:
        return torch.load(self.folder(tag) / f"{step:06d}" / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base_dir = tmp_path_factory.mktemp("world")
    chooser = random.Random(0)
    text = base_dir / "text"
    text.mkdir()
    documents = [" ".join(chooser.choices(WORDS, k=120)) + "." for _ in range(300)]
    (text / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    RustBPETokenizer.train_from_iterator(documents, 290).save(base_dir / "tokenizer")
    return World(base_dir)


@pytest.fixture(scope="module")
def uninterrupted(world: World) -> str:
    return world.run("--model_tag=whole")


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_it_learns_and_records(world: World, uninterrupted: str) -> None:
    losses = world.losses("whole")
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    evaluations = world.records("whole", "eval")
    assert [record["step"] for record in evaluations] == [0, 12]
    assert evaluations[-1]["bpb"] < 0.9 * evaluations[0]["bpb"]
    assert len(world.records("whole", "sample")) == 7
    assert "of gemm" in uninterrupted
    latest = world.base_dir / "base_checkpoints" / "latest.pt"
    assert latest.resolve().name == "model.pt"


def test_runs_are_deterministic(world: World, uninterrupted: str) -> None:
    world.run("--model_tag=again", "--num_iterations=12")
    assert world.losses("again") == world.losses("whole")


def test_resumed_equals_uninterrupted(world: World, uninterrupted: str) -> None:
    output = world.run("--model_tag=whole2", "--resume")
    assert "resuming" not in output
    for step in (12, 9):  # as if it had been killed after step 6
        folder = world.folder("whole2") / f"{step:06d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert "resuming from" in world.run("--model_tag=whole2", "--resume")
    assert_same_weights(world.weights("whole2"), world.weights("whole"))
    assert world.losses("whole2") == world.losses("whole")


def kill_and_resume(world: World, tag: str, kills: int, seed: int) -> None:
    chooser = random.Random(seed)
    for _ in range(kills):
        process = world.start(f"--model_tag={tag}", "--resume", "--save_every=1")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 0") and "loss" in line:
                break
        time.sleep(chooser.random() * 0.4)
        process.kill()
        process.communicate()
    world.run(f"--model_tag={tag}", "--resume", "--save_every=1")
    assert_same_weights(world.weights(tag), world.weights("whole"))


def test_killed_runs_resume_bit_for_bit(world: World, uninterrupted: str) -> None:
    kill_and_resume(world, "killed", kills=2, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(world: World, uninterrupted: str) -> None:
    for seed in range(5):
        kill_and_resume(world, f"killed{seed}", kills=4, seed=seed + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_leaves(
    world: World, uninterrupted: str, number: signal.Signals
) -> None:
    tag = f"stopped-{number.name}"
    process = world.start(f"--model_tag={tag}", "--save_every=-1", "--num_iterations=100000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 00003/"):
            process.send_signal(number)
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"{number.name}: saved step" in output
    saved = [path.name for path in world.folder(tag).iterdir() if path.name.isdigit()]
    assert len(saved) == 1
    assert int(saved[0]) >= 3


def test_two_ranks_train_like_one(world: World, uninterrupted: str) -> None:
    # the same documents in the same global batch need one row group a rank: compare the first
    # step, which both begin from the same weights, and the course of the rest
    world.run("--model_tag=two", ranks=2)
    one, two = world.losses("whole"), world.losses("two")
    assert two[0] == pytest.approx(one[0], rel=1e-4)
    assert two[-1] == pytest.approx(one[-1], rel=0.1)
    files = {path.name for path in (world.folder("two") / "000012").iterdir()}
    assert files >= {"model.pt", "meta.json", "optim_rank0.pt", "optim_rank1.pt"}
    output = world.run("--model_tag=two", "--resume", "--num_iterations=14", code=1)
    assert "saved by 2 ranks" in output


def test_lost_weights_stop_the_run_and_keep_the_checkpoint(world: World) -> None:
    world.run("--model_tag=nan", "--num_iterations=3")
    output = world.run(
        "--model_tag=nan", "--resume", "--num_iterations=9", "--embedding_lr=inf", code=1
    )
    assert "the weights are lost" in output
    assert "--resume" in output
    steps = [path.name for path in world.folder("nan").iterdir() if path.name.isdigit()]
    assert steps == ["000003"]
    assert all(torch.isfinite(w).all() for w in world.weights("nan", 3).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dept=3",), "depth"),
        (("--depth=three",), "three"),
        (("--total_batch_size=100",), "is not a multiple of"),
        (("--device=cuda",), "--device=cpu"),
        (("--data_dir=/nowhere",), "/nowhere"),
        (("--resume_from=nothing",), "nothing"),
        (("--kernels=tritom",), "unknown implementation"),
        (("--tokenizer_dir=/nowhere",), "/nowhere"),
        (("configs/nothing.py",), "nothing.py"),
        (("--n_kv_head=3",), "does not divide"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_bad_input_is_named(world: World, arguments: tuple[str, ...], message: str) -> None:
    process = world.start(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert message in output, output


def test_a_checkpoint_of_another_tokenizer_is_refused(world: World, uninterrupted: str) -> None:
    backwards = [" ".join(word[::-1] for word in WORDS) * 9]
    other = RustBPETokenizer.train_from_iterator(backwards, 290)
    other.save(world.base_dir / "other_tokenizer")
    output = world.run(
        "--model_tag=foreign",
        "--resume_from=whole",
        f"--tokenizer_dir={world.base_dir / 'other_tokenizer'}",
        code=1,
    )
    assert "the same ids mean other text" in output


def test_a_checkpoint_of_other_sizes_is_refused(world: World, uninterrupted: str) -> None:
    output = world.run("--model_tag=other", "--resume_from=whole", "--depth=3", code=1)
    assert "n_embd=128, this run 256" in output
