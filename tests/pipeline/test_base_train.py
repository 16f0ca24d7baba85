"""Base training as people run it: from the command line, killed, resumed, stopped, two ranks."""

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nanochat.gpt import GPT
from nanochat.locks import OwnedLock
from nanochat.optim import muon
from nanochat.text.tokenizer import RustBPETokenizer
from tests.support.runs import (
    rank_of,
    rows_of_tokens,
    run_here,
    sentences,
    torchrun,
    training_losses,
    write_shard,
)

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
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

    def start(self, *arguments: str, ranks: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
        launcher = torchrun(ranks, restarts) if ranks > 1 else [sys.executable]
        data = f"--data_dir={self.base_dir / 'text'}"
        environment = os.environ | {
            "NANOCHAT_BASE_DIR": str(self.base_dir),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [*launcher, str(ROOT / "scripts" / "base_train.py"), *SMALL, data, *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, ranks: int = 1, code: int = 0) -> str:
        """What a run to its end prints: in this process, where nothing speaks against it."""
        if ranks == 1 and code == 0:
            data = f"--data_dir={self.base_dir / 'text'}"
            return run_here(self.base_dir, "python scripts/base_train.py", *SMALL, data, *arguments)
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


@pytest.mark.parametrize("name", ["model.pt", "optim_rank0.pt", "meta.json"])
def test_a_flipped_bit_costs_one_checkpoint_not_the_run(
    world: World, uninterrupted: str, name: str
) -> None:
    tag = f"flipped-{name.partition('.')[0]}"
    shutil.copytree(world.folder("whole"), world.folder(tag), symlinks=True)
    newest = world.folder(tag) / "000012"
    content = bytearray((newest / name).read_bytes())
    at = content.index(b'"step": 12') + 9 if name == "meta.json" else len(content) // 2
    content[at] ^= 1
    (newest / name).write_bytes(content)
    message = refusal(
        world, *SMALL, f"--data_dir={world.base_dir / 'text'}", f"--model_tag={tag}",
        f"--resume_from={tag}/12",
    )  # fmt: skip
    assert f"{tag}/000012" in message
    if name == "meta.json":
        with pytest.warns(UserWarning, match=rf"skipping .*{tag}/000012: .*changed"):
            output = world.run(f"--model_tag={tag}", "--resume")
    else:
        output = world.run(f"--model_tag={tag}", "--resume")
        assert re.search(rf"skipping .*{tag}/000012: .*{name} is damaged", output)
    assert f"resuming from {world.folder(tag) / '000009'}" in output
    assert_same_weights(world.weights(tag), world.weights("whole"))
    assert world.losses(tag) == world.losses("whole")


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


def read_until(process: subprocess.Popen[str], begin: str) -> str:
    """What a process prints up to a line that begins so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(begin):
            return "".join(lines)
    pytest.fail(f"no line begins with {begin!r}: {''.join(lines)}")


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_asked_to_stop_it_saves_once_and_leaves(
    world: World, number: signal.Signals, ranks: int
) -> None:
    tag = f"stopped-{number.name}"
    endless = ("--save_every=-1", "--num_iterations=100000")
    process = world.start(f"--model_tag={tag}", *endless, ranks=ranks)
    read_until(process, "step 00003/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    # torchrun, which passes the signal on, ends with a code of its own
    assert process.returncode == (128 + number if ranks == 1 else 1), output
    assert output.count(f"{number.name}: saved step") == 1
    (saved,) = steps_on_disk(world, tag)
    assert int(saved) >= 3


@pytest.fixture(scope="module")
def two_ranks(world: World) -> str:
    return world.run("--model_tag=two", ranks=2)


def test_two_ranks_train_like_one(world: World, uninterrupted: str, two_ranks: str) -> None:
    # the same documents in the same global batch need one row group a rank: compare the first
    # step, which both begin from the same weights, and the course of the rest
    one, two = world.losses("whole"), world.losses("two")
    assert two[0] == pytest.approx(one[0], rel=1e-4)
    assert two[-1] == pytest.approx(one[-1], rel=0.1)
    files = {path.name for path in (world.folder("two") / "000012").iterdir()}
    assert files >= {"model.pt", "meta.json", "optim_rank0.pt", "optim_rank1.pt"}
    output = world.run("--model_tag=two", "--resume", "--num_iterations=14", code=2)
    assert "saved by 2 ranks" in output


def test_torchrun_replaces_a_killed_rank(world: World, two_ranks: str) -> None:
    run = ("--model_tag=restarted", "--resume", "--save_every=1")
    process = world.start(*run, ranks=2, restarts=1)
    read_until(process, "step 00003/")
    victim = rank_of(process.pid, 1)
    assert victim is not None
    victim.kill()
    # torchrun starts both ranks again, which continue by themselves
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "error: another rank has ended" in output
    assert "Traceback" not in output
    assert "resuming from" in output
    assert_same_weights(world.weights("restarted"), world.weights("two"))
    assert world.losses("restarted") == world.losses("two")


@pytest.mark.slow
def test_a_silent_rank_ends_the_run_after_the_timeout(world: World) -> None:
    endless = ("--model_tag=silent", "--save_every=-1", "--num_iterations=100000")
    process = world.start(*endless, "--collective_timeout=5", ranks=2)
    read_until(process, "step 00003/")
    victim = rank_of(process.pid, 1)
    assert victim is not None
    victim.suspend()
    said = read_until(process, "error: ")
    victim.resume()  # torchrun would kill it after half a minute
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not answer within --collective_timeout" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_ranks_fall_back_together(world: World, two_ranks: str) -> None:
    """The newest optimizer state of rank 1 alone is damaged."""
    shutil.copytree(world.folder("two"), world.folder("two_flipped"))
    newest = world.folder("two_flipped") / "000012"
    content = bytearray((newest / "optim_rank1.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optim_rank1.pt").write_bytes(content)
    output = world.run("--model_tag=two_flipped", "--resume", ranks=2)
    assert "000012: damaged, as another rank says" in output
    assert f"resuming from {world.folder('two_flipped') / '000009'}" in output
    assert_same_weights(world.weights("two_flipped"), world.weights("two"))


def test_with_a_token_cache_any_number_of_ranks_sees_the_same_batches(world: World) -> None:
    small = ("--token_cache", "--num_iterations=5", "--save_every=-1")
    assert "tokenizing" in world.run("--model_tag=cached", *small)
    assert "tokenizing" not in world.run("--model_tag=cached2", *small, ranks=2)
    assert world.losses("cached2") == pytest.approx(world.losses("cached"), rel=1e-4)


def test_a_second_run_of_a_tag_is_refused_and_spoils_nothing(world: World) -> None:
    world.run("--model_tag=twice", "--num_iterations=3")
    left = {path: path.read_bytes() for path in world.folder("twice").rglob("*.*")}
    with OwnedLock(world.folder("twice") / ".run", "of a run that continues"):
        message = refusal(
            world, *SMALL, f"--data_dir={world.base_dir / 'text'}", "--model_tag=twice"
        )
    assert f"base_checkpoints/twice is in use by process {os.getpid()} on " in message
    assert "wait for it, stop it, or use another --model_tag" in message
    now = {path: path.read_bytes() for path in world.folder("twice").rglob("*.*")}
    assert {path: content for path, content in now.items() if path.suffix != ".lock"} == {
        path: content for path, content in left.items() if path.suffix != ".lock"
    }


def failure(world: World, *arguments: str) -> str:
    """The message with which a run that began well ends."""
    data = f"--data_dir={world.base_dir / 'text'}"
    with pytest.raises(SystemExit) as error:
        run_here(world.base_dir, "python -m scripts.base_train", *SMALL, data, *arguments)
    assert str(error.value).startswith("1: "), error.value
    assert "Traceback" not in str(error.value)
    return " ".join(str(error.value).split())


def steps_on_disk(world: World, tag: str) -> list[str]:
    return sorted(path.name for path in world.folder(tag).iterdir() if path.name.isdigit())


def test_lost_weights_are_not_saved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update overflows; loss and gradient before it were finite."""
    with monkeypatch.context() as patch:
        patch.setattr(muon, "newton_schulz", lambda matrices, *_: matrices + torch.inf)
        message = failure(world, "--model_tag=lost", "--num_iterations=1")
    assert "000001 was not written: NaN or infinities" in message
    assert "No checkpoint was written yet" in message
    assert steps_on_disk(world, "lost") == []
    world.run("--model_tag=lost", "--num_iterations=3")
    monkeypatch.setattr(muon, "newton_schulz", lambda matrices, *_: matrices + torch.inf)
    message = failure(world, "--model_tag=lost", "--resume", "--num_iterations=9")
    assert "lost/000006 was not written" in message
    assert "lost/000003 is untouched: --resume from it, with lower rates" in message
    assert steps_on_disk(world, "lost") == ["000003"]
    assert all(torch.isfinite(w).all() for w in world.weights("lost", 3).values())


def test_a_loss_that_is_not_finite_is_skipped_and_counted(world: World, uninterrupted: str) -> None:
    with training_losses(lambda number, loss: loss * torch.nan if number in (4, 12) else loss):
        output = world.run("--model_tag=skips")
    assert "loss nan, gradient norm nan: no update (1 in a row, 2 in all)" in output
    assert [r["step"] for r in world.records("skips", "skipped")] == [2, 6]
    assert len(world.losses("skips")) == 10
    assert world.records("skips", "end")[-1]["skipped_steps"] == 2
    assert all(torch.isfinite(w).all() for w in world.weights("skips").values())
    assert world.losses("skips")[:2] == world.losses("whole")[:2]
    # resumed in the middle of a row of skipped steps, it counts on
    with training_losses(lambda number, loss: loss * torch.inf):
        again = ("--model_tag=skips2", "--resume", "--save_every=1")
        world.run(*again, "--num_iterations=2", "--max_skipped_steps=3")
        message = failure(world, *again, "--max_skipped_steps=3")
    assert "3 steps in a row had no finite loss and gradient, the last of them step 2" in message
    assert "skips2/000002 is untouched" in message


def test_too_little_memory_costs_no_step(world: World, uninterrupted: str) -> None:
    def none_left(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss

    with training_losses(none_left):
        message = failure(world, "--model_tag=small", "--save_every=-1")
    assert "out of memory (on 1 of 1 ranks). Lower --device_batch_size, now 2" in message
    (step,) = steps_on_disk(world, "small")
    assert f"small/{step} is untouched" in message
    world.run("--model_tag=small", "--resume")
    assert_same_weights(world.weights("small"), world.weights("whole"))


def test_a_half_made_update_is_not_saved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, calls = muon.Muon.update, itertools.count()

    def none_left(optimizer: muon.Muon, *bucket: Any) -> None:
        if next(calls) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        updates(optimizer, *bucket)

    monkeypatch.setattr(muon.Muon, "update", none_left)
    message = failure(world, "--model_tag=half", "--save_every=2")
    saved = steps_on_disk(world, "half")
    assert f"half/{saved[-1]} is untouched" in message
    assert all(int(step) % 2 == 0 for step in saved), "only what was due was saved"
    (step,) = re.findall(r"step (\d+): out of memory", message)
    assert int(step) % 2 == 1, "choose another call: the step before this one was saved anyway"


def test_an_evaluation_without_memory_is_left_out(
    world: World, uninterrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GPT.forward

    def none_left(model: GPT, *arguments: Any, **options: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, *arguments, **options)

    monkeypatch.setattr(GPT, "forward", none_left)
    output = world.run("--model_tag=blind", "--sample_every=6")
    assert "validation is left out: out of memory" in output
    assert "sampling is left out: out of memory" in output
    assert len(world.records("blind", "out_of_memory")) == 4
    assert_same_weights(world.weights("blind"), world.weights("whole"))


def test_a_signal_undoes_the_step_it_falls_into(world: World, uninterrupted: str) -> None:
    def signalled(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 10:  # the first micro-batch of step 5
            signal.raise_signal(signal.SIGTERM)
        return loss

    data = f"--data_dir={world.base_dir / 'text'}"
    run = (*SMALL, data, "--model_tag=undone", "--save_every=-1")
    with training_losses(signalled), pytest.raises(SystemExit, match="143: ") as stopped:
        run_here(world.base_dir, "python -m scripts.base_train", *run)
    assert str(stopped.value).count("SIGTERM: saved step 5;") == 1
    assert steps_on_disk(world, "undone") == ["000005"]
    world.run("--model_tag=undone", "--resume")
    assert_same_weights(world.weights("undone"), world.weights("whole"))
    assert world.losses("undone") == world.losses("whole")


def test_a_signal_during_an_evaluation_leaves_it(world: World, uninterrupted: str) -> None:
    forward, passes = GPT.forward, []

    def signalled(model: GPT, *arguments: Any, **options: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            passes.append(len(passes))
            if len(passes) == 6:  # of the validation after step 6; the one before step 0 has 4
                signal.raise_signal(signal.SIGTERM)
        return forward(model, *arguments, **options)

    with mock.patch.object(GPT, "forward", signalled), pytest.raises(SystemExit, match="143"):
        run_here(
            world.base_dir, "python -m scripts.base_train", *SMALL, "--eval_every=6",
            f"--data_dir={world.base_dir / 'text'}", "--model_tag=looking",
        )  # fmt: skip
    assert len(passes) == 6
    assert [r["step"] for r in world.records("looking", "eval")] == [0]
    world.run("--model_tag=looking", "--resume", "--eval_every=6")
    assert [r["step"] for r in world.records("looking", "eval")] == [0, 6, 12]
    assert_same_weights(world.weights("looking"), world.weights("whole"))


def test_bad_flags_end_the_process_with_2(world: World) -> None:
    assert "did you mean '--depth'" in world.run("--dept=3", code=2)


@pytest.fixture(scope="module")
def bad(world: World) -> Path:
    """Things that are no data, no checkpoint, no tokenizer and no config."""
    folder = world.base_dir / "bad"
    (folder / "empty").mkdir(parents=True)
    for kind in ("cut", "garbled"):
        write_shard(folder / kind, 0, rows_of_tokens(4))
        shard = write_shard(folder / kind, 1, rows_of_tokens(4))
        content = shard.read_bytes()
        shard.write_bytes(content[:-20] if kind == "cut" else bytes(200) + content[200:])
    torch.save({"weight": torch.ones(2)}, folder / "foreign.pt")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "meta.json").write_text('{"step": 3}')
    RustBPETokenizer.train_from_iterator(sentences(9), 280).save(folder / "tokenizer")
    (folder / "key.py").write_text("detph = 4\n")
    (folder / "type.py").write_text("depth = 4.0\n")
    return folder


def refusal(world: World, *arguments: str, script: str = "base_train") -> str:
    """The message with which a run that cannot begin ends."""
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        run_here(world.base_dir, f"python -m scripts.{script}", *arguments)
    return " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--dept=3", ("'--dept=3'", "did you mean '--depth'")),
        ("--depth=three", ("--depth=three: wanted int, at least 1",)),
        ("{bad}/key.py", ("key.py: unknown setting 'detph'", "did you mean 'depth'")),
        ("{bad}/type.py", ("type.py: depth = 4.0 is a float", "wanted int")),
        ("{bad}/nothing.py", ("nothing.py", "looked in")),
        ("--depth=0", ("--depth=0 must be at least 1",)),
        ("--n_kv_head=3", ("n_kv_head 3 does not divide 1", "use [1]")),
        ("--total_batch_size=100", ("100 is not a multiple of the 64", "--total_batch_size=64")),
        ("--device_batch_size=0", ("--device_batch_size=0 must be at least 1",)),
        ("--device_batch_size=-2", ("--device_batch_size=-2 must be at least 1",)),
        ("--max_seq_len=0", ("--max_seq_len=0 must be at least 1",)),
        ("--model_tag=a/b", ("'a/b' is no folder name", "for example d12")),
        ("--newton_schulz=gram", ("--newton_schulz=gram must be muon or polar_express",)),
        ("--kernels=tritom", ("'tritom'", "did you mean 'triton'")),
        ("--packing=greedy", ("--packing=greedy must be stream or bestfit",)),
        ("--device=cuda", ("'cuda' was asked for", "--device=cpu")),
        ("--device=tpu", ("--device=tpu must be auto, cuda, mps or cpu",)),
        ("--data_dir=/nowhere", ("/nowhere is not a folder", "parquet, JSONL or text")),
        ("--data_dir={bad}/empty", ("bad/empty", ".parquet, .jsonl, .txt")),
        ("--data_dir={bad}/cut", ("cut/shard_00001.parquet", "--skip_bad_shards")),
        ("--data_dir={bad}/garbled", ("garbled/shard_00001.parquet", "--skip_bad_shards")),
        ("--tokenizer_dir=/nowhere", ("/nowhere", "python -m scripts.tok_train")),
        ("--resume_from=nothing", ("'nothing' is neither", "holds", "(steps to 12)")),
        ("--resume_from={bad}/foreign.pt", ("foreign.pt is not a whole checkpoint", "meta.json")),
        ("--resume_from={bad}/foreign", ("not one of this project's", "name a folder that holds")),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_bad_input_is_named(
    world: World, uninterrupted: str, bad: Path, argument: str, parts: tuple[str, ...]
) -> None:
    """The value, what is allowed, and what to do; before anything is written."""
    data = () if "data_dir" in argument else (f"--data_dir={world.base_dir / 'text'}",)
    tag = () if "tag" in argument else ("--model_tag=refused",)
    message = refusal(world, *SMALL, *data, *tag, argument.format(bad=bad))
    assert [part for part in parts if part not in message] == [], message
    for folder in ("refused", "a"):
        assert not list((world.base_dir / "base_checkpoints").glob(f"{folder}/*/model.pt"))


def test_without_downloaded_data_it_says_how_to_get_some(world: World) -> None:
    message = refusal(world, *SMALL, "--dataset=fineweb-edu", "--model_tag=refused")
    assert "no parquet shard in" in message
    assert "python -m nanochat.dataset" in message
    assert "fineweb-edu or climbmix" in refusal(world, *SMALL, "--dataset=the_pile")


def test_a_dtype_is_checked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float8")
    assert "'float8' is unknown; choose bfloat16" in refusal(world, *SMALL)


def test_one_shard_is_enough_and_a_bad_one_may_be_left_out(world: World, bad: Path) -> None:
    write_shard(world.base_dir / "one_shard", 0, rows_of_tokens(12))
    small = (*SMALL, "--num_iterations=2", "--model_tag=shards")
    one = (f"--data_dir={world.base_dir / 'one_shard'}",)
    assert "done:" in run_here(world.base_dir, "python -m scripts.base_train", *small, *one)
    left = (f"--data_dir={bad / 'cut'}", "--skip_bad_shards")
    output = run_here(world.base_dir, "python -m scripts.base_train", *small, *left)
    assert re.search(r"skipped: .*cut/shard_00001\.parquet", output)
    assert "done:" in output


@pytest.mark.parametrize(
    ("script", "argument", "parts"),
    [
        ("tok_train", "--vocab_size=264", ("264 is below 265", "256 bytes", "--vocab_size=265")),
        ("tok_train", "--vocab_size=60000", ("not 60,000", "smaller --vocab_size or more text")),
        ("tok_train", "--output_dir={bad}/key.py", ("bad/key.py", "cannot lock the folder")),
        ("tok_eval", "--tokenizer_dir=/nowhere", ("/nowhere", "scripts.tok_train")),
        ("base_loss", "--checkpoint=nothing", ("'nothing'", "(steps to 12)")),
        ("base_loss", "--checkpoint={bad}/foreign.pt", ("is not a whole checkpoint", "model.pt")),
        ("base_loss", "--checkpoint=whole/7", ("'whole/7'", "(steps to 12)")),
        ("base_loss", "--tokenizer_dir={bad}/tokenizer", ("of 290 tokens", "gives 280")),
        ("base_train", "--tokenizer_dir={bad}/tokenizer", ("of 290 tokens", "gives 280")),
    ],
)
def test_bad_input_of_other_scripts_is_named(
    world: World,
    uninterrupted: str,
    bad: Path,
    script: str,
    argument: str,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: pytest.fail("no network here"))
    given = [f"--data_dir={world.base_dir / 'text'}", argument.format(bad=bad)]
    if script == "base_train":
        given += [*SMALL, "--resume_from=whole", "--model_tag=refused"]
    elif script == "base_loss" and "checkpoint" not in argument:
        given += ["--checkpoint=whole"]
    message = refusal(world, *given, script=script)
    assert [part for part in parts if part not in message] == [], message


def test_a_full_disk_ends_the_run_and_the_checkpoint_stays(world: World) -> None:
    """A limit on file sizes fails writes as a full disk does; then there is space again."""
    data = f"--data_dir={world.base_dir / 'text'}"
    run = (*SMALL, data, "--model_tag=full", "--resume")
    run_here(world.base_dir, "python -m scripts.base_train", *run, "--num_iterations=2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refusal(world, *run, "--num_iterations=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"full/000003, which needs [\d,]+ bytes.*Free space", message)
    assert [path.name for path in world.folder("full").iterdir() if path.is_dir()] == ["000002"]
    assert all(torch.isfinite(w).all() for w in world.weights("full", 2).values())
    output = run_here(world.base_dir, "python -m scripts.base_train", *run, "--num_iterations=4")
    assert "000002" in output
    assert world.folder("full").joinpath("000004/model.pt").exists()


def test_no_permission_to_write_is_said_before_training(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, since root may write anywhere."""
    small = (*SMALL, f"--data_dir={world.base_dir / 'text'}", "--model_tag=denied")
    mkdir = Path.mkdir

    def denied(path: Path, *arguments: object, **options: object) -> None:
        if path.name == "denied":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *arguments, **options)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", denied)
        message = refusal(world, *small)
    assert "cannot lock the folder (Permission denied)" in message
    assert "base_checkpoints/denied" in message
    assert "NANOCHAT_BASE_DIR" in message
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = refusal(world, *small)
    assert f"no permission to write the base directory {world.base_dir}" in message
    assert "set NANOCHAT_BASE_DIR to a folder you may write" in message


def test_a_checkpoint_of_another_tokenizer_is_refused(world: World, uninterrupted: str) -> None:
    backwards = [" ".join(word[::-1] for word in WORDS) * 9]
    other = RustBPETokenizer.train_from_iterator(backwards, 290)
    other.save(world.base_dir / "other_tokenizer")
    output = world.run(
        "--model_tag=foreign",
        "--resume_from=whole",
        f"--tokenizer_dir={world.base_dir / 'other_tokenizer'}",
        code=2,
    )
    assert "the same ids mean other text" in output


def test_a_checkpoint_of_other_sizes_is_refused(world: World, uninterrupted: str) -> None:
    output = world.run("--model_tag=other", "--resume_from=whole", "--depth=3", code=2)
    assert "n_embd=128, this run 256" in output
