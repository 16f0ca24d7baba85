"""Mid-training and fine-tuning from the command line: from checkpoint to checkpoint, resumed."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx
import pytest
import torch

from nanochat.text.tokenizer import RustBPETokenizer
from tests.support.documented import documented_commands, documented_files
from tests.support.runs import rank_of, run_here, torchrun, training_losses

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
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

    def start(
        self, script: str, *arguments: str, ranks: int = 1, restarts: int = 0
    ) -> subprocess.Popen[str]:
        launcher = torchrun(ranks, restarts) if ranks > 1 else [sys.executable]
        return subprocess.Popen(
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
        )

    def run(self, script: str, *arguments: str, ranks: int = 1, code: int = 0) -> str:
        """What a run to its end prints: in this process, where nothing speaks against it."""
        if ranks == 1 and code == 0:
            return run_here(self.base_dir, f"python scripts/{script}.py", *COMMON, *arguments)
        output, _ = (process := self.start(script, *arguments, ranks=ranks)).communicate(
            timeout=300
        )
        assert process.returncode == code, output
        return output

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


RL = ("--task=SpellingBee", "--examples_per_step=2", "--num_samples=3", "--max_new_tokens=8",
      "--eval_examples=2", "--eval_samples=2", "--keep_last=0")  # fmt: skip


@pytest.fixture(scope="module")
def rl(sft: World) -> World:
    sft.run("chat_rl", *RL, "--sft_checkpoint=chatsft_checkpoints/d2/latest.pt")
    return sft


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_profiled(world: World, stage: str, tag: str) -> None:
    """Every category has its time, and operations have costs: in any stage, while it trains on."""
    (record,) = world.records(stage, tag, "profile")
    times = record["categories"]
    assert all(times[name] > 0 for name in ("data", "forward", "backward", "optimizer")), times
    assert sum(times.values()) == pytest.approx(record["step_seconds"], rel=0.02)
    assert any(row.get("flops") for row in record["operations"] if row["category"] == "backward")


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


def test_rows_of_a_step_stand_for_its_tokens(sft: World) -> None:
    """--target_examples_per_step=4 rows of 128 tokens are the 512 tokens of MID."""
    rows = ("--target_examples_per_step=4", "--total_batch_size=1", "--model_tag=rows")
    sft.run("mid_train", *MID, *rows, "--base_checkpoint=base_checkpoints/latest.pt")
    assert_same(sft.weights("mid", "d2"), sft.weights("mid", "rows"))
    assert sft.records("mid", "rows", "plan")[0]["total_batch_size"] == 512


def test_mid_training_resumes_bit_for_bit(mid: World) -> None:
    step = mid.base_dir / "mid_checkpoints" / "d2" / "000002"
    mid.run("mid_train", *MID, f"--resume_from={step}", "--model_tag=again", "--profile=2")
    assert_same(mid.weights("mid", "d2"), mid.weights("mid", "again"))
    assert_profiled(mid, "mid", "again")


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_fine_tuning_resumes_bit_for_bit(sft: World, packing: str) -> None:
    tag = "d2"
    if packing == "packed":
        tag = "packed"
        sft.run("chat_sft", *SFT, "--packing=packed", f"--model_tag={tag}")
    step = sft.base_dir / "chatsft_checkpoints" / tag / "000004"
    again = (f"--packing={packing}", f"--resume_from={step}", f"--model_tag={tag}again")
    sft.run("chat_sft", *SFT, *again, "--profile=1")
    assert_same(sft.weights("chatsft", tag), sft.weights("chatsft", f"{tag}again"))
    assert_profiled(sft, "chatsft", f"{tag}again")


def test_reinforcement_records_rewards_and_resumes_bit_for_bit(rl: World) -> None:
    train = rl.records("chatrl", "d2", "train")
    assert len(train) == 6
    assert all(0 <= record["reward"] <= 1 and record["length"] > 0 for record in train)
    assert set(rl.records("chatrl", "d2", "eval")[-1]) >= {"pass@1", "pass@2"}
    step = rl.base_dir / "chatrl_checkpoints" / "d2" / "000004"
    rl.run("chat_rl", *RL, f"--resume_from={step}", "--model_tag=again", "--profile=1")
    assert_same(rl.weights("chatrl", "d2"), rl.weights("chatrl", "again"))
    assert_profiled(rl, "chatrl", "again")


EACH_STAGE = pytest.mark.parametrize(
    ("script", "stage", "flags"),
    [
        ("mid_train", "mid", (*MID, "--base_checkpoint=base_checkpoints/latest.pt")),
        ("chat_sft", "chatsft", (*SFT, "--mid_checkpoint=mid_checkpoints/d2/000006")),
        ("chat_rl", "chatrl", (*RL, "--sft_checkpoint=chatsft_checkpoints/d2/000006")),
    ],
)


@EACH_STAGE
def test_no_stage_takes_up_what_is_not_finite(
    sft: World, script: str, stage: str, flags: tuple[str, ...]
) -> None:
    """One bad micro-batch skips its step; bad ones from then on end the run."""
    tag = ("--model_tag=nan", "--save_every=1", "--max_skipped_steps=2", "--eval_every=-1")
    with training_losses(lambda number, loss: loss * torch.nan if number == 1 else loss):
        output = sft.run(script, *flags, *tag, "--num_iterations=2")
    assert "gradient norm nan: no update (1 in a row, 1 in all)" in output
    with (
        training_losses(lambda number, loss: loss * torch.nan),
        pytest.raises(SystemExit, match="2 steps in a row had no finite loss"),
    ):
        sft.run(script, *flags, *tag, "--resume")
    assert len(sft.records(stage, "nan", "skipped")) == 3
    for model in (sft.base_dir / f"{stage}_checkpoints" / "nan").glob("0*/model.pt"):
        weights = torch.load(model, weights_only=True)
        assert all(torch.isfinite(weight).all() for weight in weights.values())


@EACH_STAGE
def test_a_killed_stage_goes_on_bit_for_bit(
    rl: World, script: str, stage: str, flags: tuple[str, ...]
) -> None:
    again = (*flags, "--model_tag=killed", "--save_every=1", "--resume")
    # once after its first step, while it saves; then after a second one, when something is saved
    for steps, seconds in ((1, 0.0), (2, 0.15)):
        process = rl.start(script, *again)
        assert process.stdout is not None
        lines = (line for line in process.stdout if re.match(r"step 0(?!.*validation).*loss", line))
        assert len(list(islice(lines, steps))) == steps
        time.sleep(seconds)
        process.kill()
        process.communicate()
    assert "resuming from" in rl.run(script, *again)
    assert_same(rl.weights(stage, "d2"), rl.weights(stage, "killed"))


BASE_FLAGS = (*BASE, "--data_dir={base}/text", "--keep_last=0")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("script", "stage", "flags"), [("base_train", "base", BASE_FLAGS), *EACH_STAGE.args[1]]
)
def test_two_ranks_of_each_stage_survive_kills_while_they_save(
    rl: World, script: str, stage: str, flags: tuple[str, ...], rank: int
) -> None:
    """torchrun starts the ranks again three times; they continue by themselves, bit for bit."""
    flags = tuple(flag.format(base=rl.base_dir) for flag in flags)
    flags += ("--device_batch_size=1", "--num_iterations=12", "--save_every=1", "--resume")
    rl.run(script, *flags, "--model_tag=two_whole", ranks=2)
    tag = f"two_killed_{rank}"
    process = rl.start(script, *flags, f"--model_tag={tag}", ranks=2, restarts=3)
    assert process.stdout is not None
    chooser, kills, output = random.Random(rank), 0, []
    for line in process.stdout:
        output.append(line)
        # every step is saved: a moment after its line, its checkpoint is being written
        if kills < 3 and re.match(rf"step 0*{3 * (kills + 1)}/.*loss", line):
            time.sleep(chooser.random() * 0.05)
            victim = rank_of(process.pid, rank)
            assert victim is not None
            victim.kill()
            kills += 1
    process.communicate(timeout=60)
    assert process.returncode == 0, "".join(output)
    assert kills == 3
    assert_same(rl.weights(stage, "two_whole", 12), rl.weights(stage, tag, 12))


def test_switches_of_reinforcement(rl: World) -> None:
    switches = ("--clip=0.2", "--updates_per_batch=2", "--kl=0.1", "--normalize_std")
    rl.run("chat_rl", *RL, *switches, "--num_iterations=2", "--model_tag=ppo")
    assert len(rl.records("chatrl", "ppo", "train")) == 2


def test_chat_models_are_evaluated_once(rl: World) -> None:
    few = ("--device=cpu", "-a", "SpellingBee", "-x", "3", "-m", "8", "-n", "2", "-t", "1.0")

    def evaluate(*arguments: str) -> str:
        return run_here(rl.base_dir, "python scripts/chat_eval.py", *few, *arguments)

    first = evaluate("--checkpoint=chatsft_checkpoints/latest.pt")
    assert "of 3, 0 too long" in first
    assert "pass@2" in first
    (result,) = (rl.base_dir / "chat_eval").glob("*.json")
    written = result.stat().st_mtime_ns
    assert "of 3, 0 too long" in evaluate("--checkpoint=chatsft_checkpoints/latest.pt")
    assert result.stat().st_mtime_ns == written
    assert "of 3, 0 too long" in evaluate("-i", "rl")
    # the stage of the checkpoint is recorded, also where only its path tells
    assert "of 3, 0 too long" in evaluate("--checkpoint=mid_checkpoints/latest.pt")
    files = (rl.base_dir / "chat_eval").glob("*.json")
    sources = {path.name: json.loads(path.read_text())["settings"]["source"] for path in files}
    assert sorted(sources.values()) == ["mid", "rl", "sft"]
    assert all(name.removeprefix("chat").startswith(stage) for name, stage in sources.items())
    saved = json.loads(result.read_text())
    saved["settings"]["weights"] = "of another model of the same name and step"
    result.write_text(json.dumps(saved))
    evaluate("--checkpoint=chatsft_checkpoints/latest.pt")
    assert json.loads(result.read_text())["settings"] != saved["settings"]


def test_one_answer_in_the_terminal(sft: World) -> None:
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(sft.base_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "chat_cli.py"), "--device=cpu"]
    command += ["-p", "你好", "--checkpoint=chatsft_checkpoints/latest.pt", "--max_tokens=5"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.decode("utf-8").strip()
    assert b"loaded" in done.stderr
    assert b"loaded" not in done.stdout  # which has the answer alone


def test_the_web_server_starts_and_stops(sft: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(sft.base_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "chat_web.py"), "--device=cpu"]
    command += ["--checkpoint=chatsft_checkpoints/latest.pt", f"--port={port}"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                health = httpx.get(f"{address}/health").json()
                break
            except httpx.ConnectError:
                assert server.poll() is None
                time.sleep(0.2)
        assert health["status"] == "ok"
        body = {"message": "who are you?", "max_tokens": 4}
        assert "response" in httpx.post(f"{address}/chat", json=body, timeout=60).json()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def test_two_ranks_learn_what_one_learns(sft: World) -> None:
    """Two ranks of one row a step see the rows that one rank of two rows sees."""
    ranked = ("--device_batch_size=1", "--model_tag=ranked")
    sft.run("chat_sft", *SFT, *ranked, ranks=2)
    want = [record["loss"] for record in sft.records("chatsft", "d2", "train")]
    got = [record["loss"] for record in sft.records("chatsft", "ranked", "train")]
    assert got == pytest.approx(want, rel=2e-3)


def test_a_checkpoint_of_another_stage_is_refused(mid: World) -> None:
    wrong = f"--mid_checkpoint={mid.base_dir / 'base_checkpoints' / 'd2' / '000006'}"
    output = mid.run("chat_sft", *SFT, wrong, "--model_tag=wrong", code=2)
    assert "is of stage base, not mid" in output


def test_documented_tasks_without_code(rl: World, tmp_path: Path) -> None:
    """The commands of docs/adding_a_task.md, with the files that it shows, as short as can be."""
    documented_files(tmp_path)
    commands = documented_commands()
    assert len(commands) == 6
    model = "--checkpoint=chatsft_checkpoints/d2/latest.pt"
    for command in commands:
        command = re.sub(r"([\w]+\.(?:jsonl|json|csv))", rf"{tmp_path}/\1", command)
        if "chat_rl" in command:
            few = ("--sft_checkpoint=chatsft_checkpoints/d2/latest.pt", "--model_tag=own")
            run_here(rl.base_dir, command, *COMMON, *RL[1:], "--num_iterations=1", *few)
        else:
            said = run_here(rl.base_dir, command, model, "--device=cpu", "-m", "4")
            names = re.findall(r"([\w]+)\.(?:jsonl|json|csv)", command)
            assert re.findall(r"^(\w+) +accuracy", said, re.M) == names
    # a file that changed is evaluated again
    (result,) = (rl.base_dir / "chat_eval").glob("*sft_d2*.json")
    before = json.loads(result.read_text())["tasks"]["my_task"]
    (tmp_path / "my_task.jsonl").write_text('{"question": "1?", "answer": 1}')
    words = f"-a {tmp_path}/my_task.jsonl {model} --device=cpu -m 4"
    assert "of 1, 0 too long" in run_here(rl.base_dir, f"python -m scripts.chat_eval {words}")
    after = json.loads(result.read_text())["tasks"]["my_task"]
    assert (before["num_problems"], after["num_problems"]) == (3, 1)
