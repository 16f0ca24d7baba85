"""base_train with --precision=mxfp4 as people run it: resumed, refused, on two ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.layers.convert import convert
from experiments.mxfp4.layers.recipes import RECIPES
from nanochat import report
from nanochat.common import Runtime
from nanochat.tracking import METRICS_FILE
from nanochat.train import precision, run
from tests.support.runs import ROOT, SEQUENCE_LEN, TINY, losses, make_base_dir, records, run_here

pytestmark = pytest.mark.long

STEPS = 6
TRAIN = "python -m scripts.base_train --keep_last=0 --grad_clip=1.0"
EMULATED = ("--precision=mxfp4", "--mx_backend=emulate")
STOCHASTIC = (*EMULATED, "--mx_recipe=mx8f_mx4b_sr")


def train(base: Path, tag: str, *more: str, steps: int = STEPS, **environment: str) -> Path:
    arguments = (*TINY, f"--data_dir={base / 'text'}", f"--model_tag={tag}", *more)
    run_here(base, f"{TRAIN} --num_iterations={steps}", *arguments, **environment)
    return base / "base_checkpoints" / tag


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_dir(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A run of the stochastic recipe: two micro-batches a step, a checkpoint in the middle."""
    return train(base, "whole", *STOCHASTIC, f"--save_every={STEPS // 2}")


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return torch.load(run / f"{step:06d}" / "model.pt", weights_only=True)


def numbers(run: Path) -> dict[str, list[float]]:
    return {
        "loss": losses(run),
        "grad_norm": [record["grad_norm"] for record in records(run, "train")],
        "bpb": [record["bpb"] for record in records(run, "eval")],
    }


def test_the_loss_falls(whole: Path) -> None:
    assert losses(whole)[-1] < losses(whole)[0] - 1.0


def test_it_is_not_the_plain_run(base: Path, whole: Path) -> None:
    plain = train(base, "plain", steps=3)
    assert losses(plain)[0] == pytest.approx(losses(whole)[0], rel=1e-6), "the head is zero"
    assert losses(plain)[2] != losses(whole)[2]
    assert records(plain, "start")[0]["precision"] == {"name": "plain"}
    assert all("gemm_share_causal" in step for step in records(plain, "train"))


def test_resumed_equals_uninterrupted_bit_for_bit(base: Path, whole: Path) -> None:
    resumed = train(base, "resumed", *STOCHASTIC, f"--resume_from=whole/{STEPS // 2:06d}")
    first, second = weights(whole), weights(resumed)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    half = {name: values[STEPS // 2 :] for name, values in numbers(whole).items() if name != "bpb"}
    assert {name: numbers(resumed)[name] for name in half} == half
    assert numbers(resumed)["bpb"][-1] == numbers(whole)["bpb"][-1]


def test_a_run_can_end_in_the_compute_dtype(base: Path, whole: Path) -> None:
    """A tail without quantization: the checkpoint is an ordinary one."""
    tail = train(base, "tail", f"--resume_from=whole/{STEPS // 2:06d}")
    assert len(losses(tail)) == STEPS // 2
    assert losses(tail)[1:] != losses(whole)[STEPS // 2 + 1 :]
    assert records(tail, "resume")[0]["precision"] == {"name": "plain"}


def test_other_rounding_is_another_run(base: Path, whole: Path) -> None:
    """The random numbers come from the seed alone: the same weights, another seed of rounding."""
    assert losses(train(base, "again", *STOCHASTIC, steps=3)) == losses(whole)[:3]
    nearest = train(base, "nearest", *EMULATED, steps=3)
    assert losses(nearest)[:1] == losses(whole)[:1]
    assert losses(nearest)[1:] != losses(whole)[1:3]


def test_what_a_run_records(whole: Path) -> None:
    meta = json.loads((whole / f"{STEPS:06d}" / "meta.json").read_text())
    (start,) = records(whole, "start")
    assert start["precision"]["emulated"] is True
    for step in records(whole, "train"):
        assert step["emulated"] is True
        assert not [name for name in step if name.startswith(("mfu", "gemm_share"))]
    assert meta["precision"] == start["precision"]
    assert meta["settings"]["mx_recipe"] == "mx8f_mx4b_sr"
    got = start["precision"]
    assert (got["recipe"], got["backend"], got["signs"]) == ("mx8f_mx4b_sr", "emulate", "random")
    assert got["stochastic"] == "Philox4x32-10"
    assert got["instructions"] == {}
    shares = got["flop_shares"]
    assert set(shares) == {"float32", "mxfp8_e4m3 emulated", "mxfp4 emulated"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["mxfp4 emulated"] == pytest.approx(2 * shares["mxfp8_e4m3 emulated"])
    rows = {(row["layers"], row["product"]): row for row in got["products"]}
    assert rows["mlp.c_fc", "wgrad"]["path"] == "emulated"
    assert rows["lm_head", "fprop"]["path"] == "plain"
    width, depth, vocabulary = 128, 2, 384
    own = 2 * 4 * width * width * depth
    total = 6 * (depth * 12 * width**2 + vocabulary * width) + 6 * depth * width * SEQUENCE_LEN
    assert rows["mlp.c_fc", "wgrad"]["share"] == pytest.approx(own / total)


def test_the_report_gives_no_speed_of_emulated_products(whole: Path, tmp_path: Path) -> None:
    alone = tmp_path / "base_checkpoints" / "whole"
    alone.mkdir(parents=True)
    (alone / METRICS_FILE).write_text((whole / METRICS_FILE).read_text())
    report.main(["generate", f"--base_dir={tmp_path}"])
    text = (tmp_path / "report/report.md").read_text()
    assert "| tokens/s, median, emulated: no speed |" in text
    assert "share of the measured GEMM" not in text
    assert "MFU" not in text


def test_what_a_run_prints(base: Path) -> None:
    arguments = (*TINY, f"--data_dir={base / 'text'}", "--model_tag=said", *EMULATED)
    said = run_here(base, f"{TRAIN} --num_iterations=1", *arguments, "--mx_keep=blocks.0.mlp")
    lines = [line.split() for line in said.splitlines()]
    emulated = "fprop mxfp8_e4m3 emulated, dgrad mxfp4 emulated, wgrad mxfp4 emulated"
    plain = "fprop float32, dgrad float32, wgrad float32"
    for words in (
        "precision mxfp4, recipe mx8f_mx4b, backend emulate",
        f"attn.c_qkv x 2 21.8% {emulated}",
        f"mlp.c_fc x 1 14.5% {emulated}",
        f"mlp.c_fc, kept x 1 14.5% {plain}",
        f"lm_head x 1 10.9% {plain}",
    ):
        assert words.split() in lines
    assert "FLOPs of matrix products: float32 " in said
    (step,) = (line for line in said.splitlines() if "tok/s" in line)
    assert "tok/s | emulated, no speed | " in step
    assert "of gemm" not in step


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--precision=mxfp4",), "on cpu.*--mx_backend=emulate"),
        (("--precision=mxfp4", "--mx_backend=native"), "mxfp8_e4m3, mxfp4 products need a GPU"),
        ((*EMULATED, "--mx_recipe=mx8f_mxfp4b"), "did you mean 'mx8f_mx4b'"),
        ((*EMULATED, "--mx_keep=blocks.9"), "no layer is called 'blocks.9'"),
        (("--precision=mxfp4", "--mx_backend=fast"), "backend 'fast' is unknown"),
        (("--precision=mxfp",), "precision 'mxfp' is unknown; did you mean 'mxfp4'"),
        (("--mx_recipe=mxfp8",), "--mx_recipe=mxfp8 means nothing with --precision=plain"),
        ((*EMULATED, "--max_seq_len=9", "--total_batch_size=18"), "18 tokens of a micro-batch"),
    ],
)
def test_what_is_refused(base: Path, flags: tuple[str, ...], part: str) -> None:
    with pytest.raises((SystemExit, NotNativeError), match=part):
        train(base, "refused", *flags, steps=1)


def test_nanochat_works_without_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "EXPERIMENTS", "no_such_package")
    cpu = Runtime(torch.device("cpu"), torch.float32, 0, 0, 1, 42, Path())
    model = run.build_model(run.model_config(1, -1, 32, 70), cpu, 0)
    plain = precision.prepare("plain", model, cpu, {"depth": 1, "mx_recipe": ""})
    plain.begin_step(3)
    assert plain.record == {"name": "plain"}
    precision.accept_weights(model, {"settings": {}})
    with pytest.raises(ValueError, match="precision 'mxfp4' is unknown; known are plain"):
        precision.prepare("mxfp4", model, cpu, {})


NATIVE = """
import sys, torch
from unittest import mock
from experiments.mxfp4.kernels import native
from experiments.mxfp4.layers.convert import require_native_products
from experiments.mxfp4.layers.recipes import RECIPES
cuda = torch.device("cuda")
for target in sys.argv[1:]:
    with (mock.patch.object(torch.cuda, "is_available", lambda: True),
          mock.patch.object(native, "architecture_of", lambda device: target)):
        try:
            print(target, require_native_products(RECIPES["mx8f_mx4b"], cuda))
        except native.NotNativeError as error:
            print(target, "refused:", error)
"""


def test_native_is_refused_on_gpus_without_the_instruction() -> None:
    """SM90 multiplies in bfloat16 instead; of a GPU that Triton does not know there is no code."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", NATIVE, "sm_90", "sm_199", "sm_120"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    hopper, unknown, blackwell = result.stdout.splitlines()
    assert hopper.startswith("sm_90 refused: mxfp8_e4m3 products on sm_90 with Triton 3.")
    assert "found: wgmma" in hopper
    assert unknown.startswith("sm_199 refused: mxfp8_e4m3 products on sm_199 with Triton 3.")
    assert "kind::mxf4nvf4.block_scale" in blackwell
    assert "kind::mxf8f6f4.block_scale" in blackwell


def rank_main(rank: int, base_dir: Path, port: int) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    names = {name: str(value) for name, value in (places | address).items()}
    train(base_dir, "two", *EMULATED, steps=3, **names)


def test_two_ranks_train_like_one(base: Path) -> None:
    """Deterministic rounding of each micro-batch: only the order of sums differs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (base, port), nprocs=2)
    two = base / "base_checkpoints" / "two"
    one = train(base, "one", *EMULATED, steps=3)
    assert losses(two) == pytest.approx(losses(one), rel=2e-3)
    assert records(two, "start")[0]["precision"]["recipe"] == "mx8f_mx4b"


@pytest.mark.gpu
def test_native_training_is_near_the_emulated() -> None:
    if torch.cuda.get_device_capability() not in ((10, 0), (12, 0)):
        pytest.skip("this GPU has no block-scaled tensor cores")
    device = torch.device("cuda")
    gpu = Runtime(device, torch.bfloat16, 0, 0, 1, 42, Path())
    ids = torch.randint(70, (4, 128), device=device)
    found = []
    for backend in ("native", "emulate"):
        model = run.build_model(run.model_config(2, -1, 128, 70), gpu, 0)
        conversion = convert(model, RECIPES["mx8f_mx4b"], (), backend)
        optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
        for step in range(10):
            conversion.begin_step(step)
            loss = model(ids, ids)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append(float(loss))
    assert found[0] < 3.0
    assert found[0] == pytest.approx(found[1], rel=0.05)
