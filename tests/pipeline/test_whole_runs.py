"""The scripts that run every stage, at toy size: each once, in its order, again after changes."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.runs import ROOT, VOCAB_SIZE, rows_of_tokens, write_shard

pytestmark = pytest.mark.long

CONFIGS = {
    "tok_train": f"vocab_size = {VOCAB_SIZE}\n",
    "tok_eval": "",
    "base_train": (
        "device = 'cpu'\ndepth = 2\nmax_seq_len = 256\ndevice_batch_size = 2\n"
        "total_batch_size = 512\nnum_iterations = 2\neval_tokens = 512\nsample_every = -1\n"
    ),
    "base_loss": "device = 'cpu'\ndevice_batch_size = 2\nsplit_tokens = 512\n",
    "mid_train": (
        "mixture = 'local'\ndevice = 'cpu'\ndevice_batch_size = 2\ntotal_batch_size = 512\n"
        "num_iterations = 2\neval_tokens = 512\n"
    ),
    "chat_sft": (
        "mixture = 'local'\ndevice = 'cpu'\ndevice_batch_size = 2\ntarget_examples_per_step = 2\n"
        "num_iterations = 2\neval_steps = 1\n"
    ),
    "chat_rl": (
        "task = 'Arithmetic'\ndevice = 'cpu'\nnum_iterations = 1\nexamples_per_step = 1\n"
        "num_samples = 2\nmax_new_tokens = 4\neval_examples = 1\neval_samples = 1\n"
    ),
    "chat_eval": (
        "task_name = 'Arithmetic'\ndevice = 'cpu'\nmax_problems = 2\nmax_new_tokens = 4\n"
    ),
    "chat_cli": "prompt = 'Who are you?'\ndevice = 'cpu'\nmax_tokens = 4\n",
}
STAGES = [
    "dataset", "tok_train", "tok_eval", "base_train", "base_loss", "chat_eval_base", "mid_train",
    "chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl",
]  # fmt: skip


@dataclass(frozen=True)
class Checkout:
    """A copy of the scripts beside the code, with a config folder `toy`; nothing is installed."""

    folder: Path

    @property
    def base_dir(self) -> Path:
        return self.folder / "base"

    def run(self, *words: str, code: int = 0) -> str:
        names = {
            "NANOCHAT_BASE_DIR": str(self.base_dir),
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "1",
            "TIKTOKEN_CACHE_DIR": str(self.folder / "no_cache"),
            "HTTPS_PROXY": "http://127.0.0.1:9",
        }
        done = subprocess.run(
            ["bash", *words],
            cwd=self.folder,
            env=os.environ | names,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def model(self, stage: str) -> Path:
        return self.base_dir / f"{stage}_checkpoints" / "toy"


def stages(output: str, kind: str) -> list[str]:
    """Stages that the output says ran, were done before or left out."""
    said = re.findall(r"^== (\w+): (.*)", output, flags=re.M)
    begins = {"ran": ("python", "on_gpus")}.get(kind, (kind,))
    return [stage for stage, what in said if what.startswith(begins)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("nanochat", "scripts", "tasks", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "dev").mkdir()
    for name in ("dev/runcpu.sh", "dev/stages.sh", "speedrun.sh", "run1000.sh"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "dev" / "install.sh").write_text("echo installed\n")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "toy").mkdir()
    for name, text in CONFIGS.items():
        (folder / "toy" / f"{name}.py").write_text(text)
    base = folder / "base"
    # the data that the scripts would make or fetch is there
    for name in ("base_data", "base_data_embedded"):
        shard = write_shard(base / name, 0, [" ".join(rows_of_tokens(30, seed)) for seed in "abc"])
        if name == "base_data":
            for index in range(1, 800):
                shard.with_name(f"shard_{index:05d}.parquet").hardlink_to(shard)
    return Checkout(folder)


@pytest.fixture(scope="module")
def first(checkout: Checkout) -> str:
    return checkout.run("speedrun.sh", "toy", "--with=chat_rl", "--with=chat_eval_base")


def test_every_stage_runs_in_its_order(checkout: Checkout, first: str) -> None:
    assert stages(first, "ran") == STAGES
    report = (checkout.base_dir / "report" / "report.md").read_text()
    assert "| Arithmetic |" in report
    for title in (
        "Base training",
        "Midtraining",
        "Supervised finetuning",
        "Reinforcement learning",
    ):
        assert f"## {title}" in report
    assert "== one answer" in first
    assert "speedrun.sh: finished" in first


def test_again_nothing_is_done_twice(checkout: Checkout, first: str) -> None:
    again = checkout.run("speedrun.sh", "toy", "--with=chat_rl", "--with=chat_eval_base")
    assert stages(again, "ran") == []
    assert stages(again, "done before") == STAGES
    assert "speedrun.sh: finished" in again


def test_a_lost_model_is_trained_again_with_what_follows(checkout: Checkout, first: str) -> None:
    before = (checkout.model("base") / "latest.pt").resolve().stat().st_mtime_ns
    shutil.rmtree(checkout.model("mid"))
    output = checkout.run("speedrun.sh", "toy", "--with=chat_eval_base", "--skip=chat_eval_mid")
    assert stages(output, "ran") == ["mid_train", "chat_sft", "chat_eval_sft"]
    assert stages(output, "left out") == ["chat_eval_mid", "chat_rl"]
    assert "removing chatrl_checkpoints/toy" in output
    assert not checkout.model("chatrl").exists()
    assert (checkout.model("base") / "latest.pt").resolve().stat().st_mtime_ns == before


def test_a_second_run_has_a_tokenizer_of_its_own(checkout: Checkout, first: str) -> None:
    usual = checkout.base_dir / "tokenizer" / "tokenizer_ranks.json"
    before = usual.read_bytes()
    (checkout.folder / "other").mkdir()
    for name in ("tok_train", "base_train"):
        text = CONFIGS[name].replace(str(VOCAB_SIZE), str(VOCAB_SIZE - 10))
        (checkout.folder / "other" / f"{name}.py").write_text(text)
    output = checkout.run("dev/runcpu.sh", "other", "--skip=dataset")
    assert stages(output, "ran") == ["tok_train", "base_train"]
    assert usual.read_bytes() == before
    own = checkout.base_dir / "tokenizers" / "other"
    assert (own / "tokenizer_ranks.json").exists()
    assert f"latest.pt --tokenizer_dir={own}" in output
    assert (usual.parent / "run").read_text() == "toy\n"


def test_without_mid_training(checkout: Checkout, first: str) -> None:
    shutil.rmtree(checkout.model("chatsft"))
    output = checkout.run("run1000.sh", "toy", "--skip=mid_train", "--skip=tok_eval")
    assert "--source=base --mid_checkpoint=base_checkpoints/toy/latest.pt" in output
    assert checkout.model("chatsft").exists()


def test_on_the_cpu(checkout: Checkout, first: str) -> None:
    output = checkout.run(
        "dev/runcpu.sh", "toy", *(f"--skip={stage}" for stage in STAGES if stage != "dataset")
    )
    assert "installed" in output
    assert stages(output, "left out") == [
        s for s in STAGES[1:] if "eval_" not in s and "loss" not in s
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--only=x",), "there is no --only=x"), (("nowhere",), "'nowhere' has no base_train.py")],
)
def test_bad_arguments_are_named(checkout: Checkout, words: tuple[str], message: str) -> None:
    output = checkout.run("speedrun.sh", *words, code=2)
    assert message in output
    assert "usage: bash speedrun.sh" in output
