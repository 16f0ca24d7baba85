"""Commands of the base pipeline as people type them, on toy data; further flags make them small.

Commands that differ in how Python starts run in processes of their own: a script by its path, a
module, torchrun. The other spellings of the same scripts run inside this process.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from nanochat import configurator, scaling
from scripts.base_train import Settings
from tests.support.runs import (
    ROOT,
    TINY,
    VOCAB_SIZE,
    losses,
    make_base_dir,
    records,
    rows_of_tokens,
    run_here,
    sentences,
    write_shard,
)

pytestmark = pytest.mark.long

SMALL = " ".join((*TINY, "--num_iterations=2"))
SMALL_LOSS = "--device=cpu --device_batch_size=2 --split_tokens=128"
TOKENS = f"--vocab_size={VOCAB_SIZE}"
STABLE = "configs/dual_gpu/stable_26gb.py"
# command as it is written -> (flags after it, what it prints); those of a group run side by side
PIPELINE: list[dict[str, tuple[str, str]]] = [
    {"python nanochat/dataset.py -n 2": ("", "base_data train: ")},
    {
        "python scripts/tok_train.py --vocab_size=65536 --data_dir=./data": (
            f"{TOKENS} --output_dir={{base}}/from_data", f"{VOCAB_SIZE} tokens from"),
    },
    {
        f"python scripts/base_train.py {STABLE}": (
            f"{SMALL} --model_tag=config --depth=3", "step 00002/00002"),
        f"torchrun --nproc_per_node=2 scripts/base_train.py {STABLE}": (
            f"{SMALL} --model_tag=two", "world_size 2"),
        "torchrun -m scripts.base_train --depth=12": (f"{SMALL} --model_tag=one", "world_size 1"),
    },
    {
        "python -m scripts.base_loss --checkpoint=base_checkpoints/latest.pt": (
            SMALL_LOSS, "val   bpb"),
        "python -m scripts.base_eval --checkpoint=base_checkpoints/latest.pt": (
            "--device=cpu --bundle_dir={base}/bundle", "core "),
        "python scripts/tok_eval.py": ("", "gpt2 is left out"),
    },
    {"python -m nanochat.report generate": ("", "report.md")},
]  # fmt: skip
ORDER = [(command, *rest) for group in PIPELINE for command, rest in group.items()]


@dataclass(frozen=True)
class House:
    """A folder that looks like a checkout beside data, and a base directory; never a network."""

    folder: Path

    @property
    def base_dir(self) -> Path:
        return self.folder / "base"

    def run(self, command: str, more: str) -> CompletedProcess[str]:
        """Run a command line in the checkout, in a process of its own."""
        words = shlex.split(f"{command} {more.format(base=self.base_dir)}")
        programs = {
            "python": sys.executable,
            "torchrun": str(Path(sys.executable).parent / words[0]),
        }
        nowhere = "http://127.0.0.1:9"  # where nothing listens
        names = {
            "NANOCHAT_BASE_DIR": str(self.base_dir),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PET_MASTER_PORT": str(free_port()),  # --master_port of torchrun
            "HF_ENDPOINT": nowhere,
            "HTTP_PROXY": nowhere,
            "HTTPS_PROXY": nowhere,
            "TIKTOKEN_CACHE_DIR": str(self.folder / "no_cache"),
        }
        return subprocess.run(
            [programs[words[0]], *words[1:]],
            cwd=self.folder,
            env=os.environ | names,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_bundle(folder: Path) -> None:
    """A CORE bundle of one task."""
    (folder / "eval_data").mkdir(parents=True)
    item = {"query": "the quick brown", "choices": ["fox", "tea"], "gold": 0}
    (folder / "eval_data" / "toy.jsonl").write_text((json.dumps(item) + "\n") * 3)
    task = "label: toy\n  dataset_uri: toy.jsonl\n  num_fewshot: [1]\n  icl_task_type: "
    (folder / "core.yaml").write_text(f"icl_tasks:\n-\n  {task}multiple_choice\n")
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ntoy,50\n")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House(tmp_path_factory.mktemp("house"))
    for name in ("nanochat", "scripts", "configs"):
        (house.folder / name).symlink_to(ROOT / name)
    (house.folder / "data").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in sentences(40)]
    (house.folder / "data" / "text.jsonl").write_text("".join(lines))
    make_base_dir(house.base_dir)
    # every shard that the commands name is there, so that none is fetched
    shard = write_shard(house.base_dir / "base_data", 0, rows_of_tokens(12))
    for index in range(1, 300):
        shard.with_name(f"shard_{index:05d}.parquet").hardlink_to(shard)
    write_bundle(house.base_dir / "bundle")
    return house


@pytest.fixture(scope="module")
def done(house: House) -> dict[str, CompletedProcess[str]]:
    """Every command of the pipeline, run in its order."""
    finished: dict[str, CompletedProcess[str]] = {}
    with ThreadPoolExecutor(2) as pool:
        for group in PIPELINE:
            running = {
                command: pool.submit(house.run, command, more)
                for command, (more, _) in group.items()
            }
            finished |= {command: future.result() for command, future in running.items()}
    return finished


@pytest.mark.parametrize(("command", "more", "printed"), ORDER, ids=[each[0] for each in ORDER])
def test_command(
    done: dict[str, CompletedProcess[str]], command: str, more: str, printed: str
) -> None:
    assert done[command].returncode == 0, done[command].stdout
    assert printed in done[command].stdout


def test_what_the_pipeline_leaves(house: House, done: dict[str, CompletedProcess[str]]) -> None:
    """The config file holds where no flag speaks; two ranks and one see the same first loss."""
    runs = house.base_dir / "base_checkpoints"
    (start,) = records(runs / "config", "start")
    assert (start["settings"]["run"], start["settings"]["eval_every"]) == (
        "dual_gpu_stable_26gb",
        100,
    )
    assert start["settings"]["depth"] == 3, "a flag replaces the config file's 14"
    first = [losses(runs / tag)[0] for tag in ("config", "one", "two")]
    assert first == pytest.approx([first[0]] * 3, rel=1e-3)  # ln of the vocabulary, untrained
    latest = (runs / "latest.pt").resolve().parents[1]  # whichever ended last
    (core,) = records(latest, "core", "base_eval")
    accuracy = records(latest, "task", "base_eval")[0]["accuracy"]
    assert core["core"] == pytest.approx(2 * accuracy - 1)
    assert (house.base_dir / "from_data" / "tokenizer_ranks.json").is_file()
    report = (house.base_dir / "report" / "report.md").read_text()
    assert "## Base training" in report
    assert "## Base evaluation" in report


@pytest.mark.parametrize(
    ("command", "more", "printed"),
    [
        ("python -m nanochat.dataset -n 10", "", "base_data train: "),
        ("python -m nanochat.dataset -n 8", "", "documents in"),
        ("python -m nanochat.dataset -n 300", "", "base_data val: 12 documents in 6 row groups"),
        ("python scripts/tok_train.py --vocab_size=65536", TOKENS, f"{VOCAB_SIZE} tokens"),
        ("python -m scripts.tok_train", TOKENS, f"{VOCAB_SIZE} tokens from"),
        ("python -m scripts.tok_train --max_chars=2000000000", TOKENS, f"{VOCAB_SIZE} tokens"),
        ("python -m scripts.base_train --depth=12 --device_batch_size=8", "", "step 00002/00002"),
        ("python -m scripts.base_train --max_seq_len=1024", "", "step 00002/00002"),
        ("python -m scripts.base_train --depth=24", "", "step 00002/00002"),
        ("python -m scripts.base_train --matrix_lr=0.03", "", "step 00002/00002"),
        (f"python -m scripts.base_train --config {STABLE}", "", "step 00002/00002"),
        (f"python -m scripts.base_train --config={STABLE}", "", "step 00002/00002"),
        ("python -m scripts.base_train --core_metric_every=1", "", "step 00001 | CORE "),
        ("python -m scripts.base_eval", "--bundle_dir={base}/bundle --device=cpu", "core "),
        ("python -m scripts.base_eval --tasks=toy", "--bundle_dir={base}/bundle", "mean centred"),
        ("python -m scripts.base_loss", SMALL_LOSS, "train bpb"),
        ("python -m scripts.tok_eval", "", "is left out"),
        ("python -m nanochat.report reset", "", "removed"),
    ],
)
def test_other_spellings(
    house: House,
    done: dict[str, CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    more: str,
    printed: str,
) -> None:
    def no_network(name: str) -> None:
        raise OSError(f"{name} would be fetched")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    if "base_train" in command:
        more = f"{SMALL} --model_tag=spelled --core_bundle_dir={{base}}/bundle"
    elif "tok_train" in command:
        more += " --output_dir={base}/spelled"
    assert printed in run_here(
        house.base_dir, command, *shlex.split(more.format(base=house.base_dir))
    )


@pytest.mark.parametrize("flag", ["--device_batch_size=8", "--max_seq_len=1024", "--depth=12"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_one_flag_alone_keeps_the_batch_divisible(flag: str, world_size: int) -> None:
    settings = configurator.load(Settings, [flag])
    sizes = settings.total_batch_size, settings.device_batch_size, settings.max_seq_len
    assert scaling.accumulation_steps(*sizes, world_size) >= 1


TEMPLATE = """
import argparse

from nanochat.common import print0, setup_training
from nanochat.configurator import Configurator


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    args = parser.parse_args()
    config = Configurator(args.config)
    runtime = setup_training()
    print0(f"depth {config.depth}, {config.total_batch_size} tokens, {runtime.device.type}")


if __name__ == "__main__":
    main()
"""


def test_a_script_of_ones_own(house: House, tmp_path: Path) -> None:
    """The template that documents of the project have shown to people who extend it."""
    script = tmp_path / "my_training.py"
    script.write_text(TEMPLATE)
    output = run_here(house.base_dir, f"python {script} --config {STABLE}")
    assert output.startswith("depth 14, 110592 tokens, ")
