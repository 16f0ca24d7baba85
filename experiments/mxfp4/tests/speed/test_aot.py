"""Block-scaled kernels compiled ahead of time: what ships, what is native, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.mxfp4.kernels.ptx import block_scaled, matrix_products
from experiments.mxfp4.numbers.formats import FORMATS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[4]
COMPILED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
EPILOGUES = {
    "mxfp4": {"store", "add", "relu2"},
    "mxfp8_e4m3": {"store", "add", "relu2"},
    "mxfp8_e5m2": {"store", "add"},
    "nvfp4": {"store", "add"},
}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m experiments.mxfp4.speed.aot` found, in a process where Triton compiles."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    result = run(["-m", "experiments.mxfp4.speed.aot", "--json", str(path)], COMPILED)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return json.loads(path.read_text())


def test_every_shipped_kernel_passes(table: dict[str, Any]) -> None:
    assert [row for row in table["rows"] if row["faults"]] == []
    for row in table["rows"]:
        assert row["spills"] == 0
        assert row["shared_bytes"] <= (101_376 if row["target"] == "sm_120" else 232_448)


@pytest.mark.parametrize("target", ["sm_100", "sm_120"])
def test_every_product_is_block_scaled(table: dict[str, Any], target: str) -> None:
    rows = [r for r in table["rows"] if (r["target"], r["kernel"]) == (target, "matmul_kernel")]
    found: dict[str, set[str]] = {}
    for row in rows:
        assert ".block_scale" in row["products"]
        four_bits = "mxf4" in row["products"]
        assert four_bits == (FORMATS[row["dtype"]].element == "e2m1")
        constants = dict(pair.split("=", 1) for pair in row["configuration"].split() if "=" in pair)
        found.setdefault(row["dtype"], set()).add(constants["EPILOGUE"])
    assert found == EPILOGUES


def test_quantizers_and_decoding_ship_everywhere(table: dict[str, Any]) -> None:
    for target in ("sm_90", "sm_100", "sm_120"):
        kernels = {row["kernel"] for row in table["rows"] if row["target"] == target}
        assert kernels >= {"tiles_kernel", "rms_norm_kernel", "gemv_kernel"}


def test_native_is_read_from_the_compiled_kernel(table: dict[str, Any]) -> None:
    for target, answer in (("sm_90", False), ("sm_100", True), ("sm_120", True)):
        assert table["native"][target] == dict.fromkeys(FORMATS, answer)


REFUSAL = """
from experiments.mxfp4.kernels.native import NotNativeError, require_native
print(require_native("mxfp4", "sm_120"))
for fmt in ("mxfp4", "nvfp4"):
    try:
        require_native(fmt, "sm_90")
    except NotNativeError as error:
        print(error)
"""


def test_refusals_name_gpu_version_and_instruction() -> None:
    native, first, second = run(["-c", REFUSAL], COMPILED).stdout.splitlines()
    assert native.startswith("mma.sync.aligned.m16n8k64")
    assert "kind::mxf4nvf4.block_scale" in native
    assert first.startswith("mxfp4 products on sm_90 with Triton 3.")
    assert "found: wgmma.mma_async.sync.aligned" in first
    assert "bf16.bf16" in first
    assert "nvfp4 products on sm_90" in second  # no pass of the compiler takes it there
    assert "found: no code" in second


SPILLING = """
from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.speed import aot
from nanochat.kernels.aot import gate
from nanochat.kernels.launch import table
tiles = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256}
gemm.TILES["mxfp4", "add"].default = [tiles | {"num_warps": 4, "num_stages": 3}]
gemm.TILES["mxfp8", "add"].default = [tiles | {"num_warps": 8, "num_stages": 6}]
table("sm_120", gemm.TABLES).clear()
calls = {(call.dtype, call.size): call for call in aot.product_calls("sm_120")}
for fmt in ("mxfp4", "mxfp8_e4m3"):
    (row,) = gate([calls[fmt, "add K=768"]], "sm_120", aot.block_scaled_products)
    print(row.faults)
"""


def test_the_gate_refuses_spills_and_shared_memory() -> None:
    spills, shared = run(["-c", SPILLING], COMPILED).stdout.splitlines()
    assert "spills" in spills
    assert "B of shared memory, limit 101376" in shared


def test_matrix_products_of_a_text() -> None:
    native = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32"
    upcast = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    tensor_memory = "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X"
    text = f"\t{native} {{ %r1 }};\n\t@%p1 {upcast} {{}};\n\twgmma.fence.sync.aligned;\n\t{native};"
    assert matrix_products(text) == [native, upcast]
    assert matrix_products(f"@%p2 {tensor_memory} [%r1];") == [tensor_memory]
    assert block_scaled([upcast, native]) == native
    assert block_scaled([upcast]) == ""


def test_interpreted_triton_is_refused() -> None:
    result = run(["-m", "experiments.mxfp4.speed.aot"], {**os.environ, "TRITON_INTERPRET": "1"})
    assert result.returncode != 0
    assert "unset it" in result.stderr
