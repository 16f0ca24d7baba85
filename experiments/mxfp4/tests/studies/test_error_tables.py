"""Tables of quantization errors."""

import json
from pathlib import Path

import pytest
import torch

from experiments.mxfp4.studies import error_tables
from tests.support.runs import make_base_dir, run_here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_dir(tmp_path_factory.mktemp("compare"))


def test_error_sums_of_known_numbers() -> None:
    """6 and 0.25 in one block: 0.25 rounds to the even code 0."""
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([6.0, 0.25])
    text = "mxfp4 even"
    error, aligned, total = error_tables.error_sums(x, error_tables.quantizer_of(text)[0], None)
    assert (error, aligned, total) == (0.0625, 36.0, 36.0625)


def test_error_tables_of_a_run(base: Path) -> None:
    run_here(
        base,
        "python -m scripts.base_train --device=cpu --depth=1 --max_seq_len=32 --num_iterations=3 "
        "--device_batch_size=2 --total_batch_size=64 --eval_tokens=64 --sample_every=-1",
        f"--data_dir={base / 'text'}",
    )
    command = "python -m experiments.mxfp4.studies.error_tables --device=cpu --batch_size=2"
    output = base / "errors.json"
    run_here(base, command, f"--data_dir={base / 'text'}", f"--output={output}")
    document = json.loads(output.read_text())
    rows = {(r["layers"], r["operand"], r["quantizer"]): r for r in document["rows"]}
    assert len(rows) == 4 * 6 * len(error_tables.QUANTIZERS)
    for layers in ("attn.c_qkv", "mlp.c_fc"):
        assert 0.009 < rows[layers, "W", "mxfp4 even"]["relative_error"] < 0.017
        stochastic = rows[layers, "dy", "mxfp4 rceil stochastic"]
        assert stochastic["alignment"] == pytest.approx(1, abs=0.02)
    assert output.with_suffix(".md").read_text().count("\n## ") == 3
