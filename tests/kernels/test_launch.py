"""Configurations of kernels, and narrow floats in the interpreter."""

import json

import pytest
import torch

from nanochat.kernels import launch
from nanochat.kernels.launch import CONFIGS, TABLES, Config, cdiv, next_power_of_2
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.registry import REGISTRY, Op, operations
from nanochat.kernels.rms_norm import rms_norm


@pytest.fixture
def tiles(tmp_path):
    made = Config(
        "test.tiles",
        {"element_size": 4, "BLOCK": 8},
        {"up_to": 64, "BLOCK": 16, "origin": "not measured"},
        folder=tmp_path,
    )
    yield made
    del CONFIGS["test.tiles"]


def test_the_first_entry_that_fits_counts(tiles: Config) -> None:
    half, single = torch.empty(0, dtype=torch.float16), torch.empty(0)
    assert tiles.choose(single, 1000) == {"BLOCK": 8}
    assert tiles.choose(half, 64) == {"BLOCK": 16}
    with pytest.raises(ValueError, match=r"no configuration of generic covers size 65.*--kernels"):
        tiles.choose(half, 65)


def test_the_table_of_a_gpu_replaces_the_defaults(tiles: Config) -> None:
    (tiles.folder / "sm_77.json").write_text(json.dumps({"test.tiles": [{"BLOCK": 32}]}))
    x = torch.empty(0)
    with launch.recording("sm_77") as recorder:
        assert tiles.choose(x, 5) == {"BLOCK": 32}
    with launch.recording("sm_78"):
        assert tiles.choose(x, 5) == {"BLOCK": 8}
    assert recorder.lookups == [(tiles, 5, 4, {"BLOCK": 32})]


def test_shipped_tables_name_configurations_that_exist() -> None:
    operations()
    unknown = [
        f"{path.name}: {kernel}"
        for path in TABLES.glob("*.json")
        for kernel in json.loads(path.read_text())
        if kernel not in CONFIGS
    ]
    assert not unknown


def test_a_name_is_taken_once(tiles: Config) -> None:
    with pytest.raises(ValueError, match=r"configuration 'test.tiles' already"):
        Config("test.tiles")
    with pytest.raises(ValueError, match="operation 'rms_norm' already"):
        Op("rms_norm", rms_norm.reference, rms_norm.cost, rms_norm.examples, rms_norm.workload)
    assert REGISTRY["rms_norm"] is rms_norm


def test_sizes_of_grids_and_blocks() -> None:
    assert [cdiv(n, 4) for n in (1, 4, 5)] == [1, 1, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 768, 1024)] == [1, 2, 4, 1024, 1024]


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // PACK)
    block = tl.arange(0, K // 32)
    a = tl.load(a_ptr + m[:, None] * (K // PACK) + k[None, :])
    b = tl.load(b_ptr + n[None, :] * (K // PACK) + k[:, None])
    a_scale = tl.load(a_scale_ptr + m[:, None] * (K // 32) + block[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // 32) + block[None, :])
    c = tl.dot_scaled(a, a_scale, FORMAT, b, b_scale, FORMAT)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles, nothing is interpreted")
class TestInterpreter:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_casts_round_to_nearest_even_and_saturate(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        limit = torch.finfo(dtype).max
        x = torch.randn(128) * 10.0 ** torch.randint(-6, 6, (128,))
        want = x.clamp(-limit, limit).to(dtype)
        y = torch.empty(128, dtype=dtype)
        launch.launch(cast_kernel, (1,), x, y, N=128)
        assert torch.equal(y.float(), want.float())

    @pytest.mark.parametrize("fmt", ["e2m1", "e4m3"])
    def test_block_scaled_products(self, fmt: str) -> None:
        torch.manual_seed(0)
        m, n, k = 16, 32, 64
        scales = [torch.randint(124, 131, (rows, k // 32), dtype=torch.uint8) for rows in (m, n)]
        exact = []
        if fmt == "e2m1":
            values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            table = torch.cat((values, -values))
            codes = [torch.randint(16, (rows, k)) for rows in (m, n)]
            operands = [(c[:, ::2] + 16 * c[:, 1::2]).to(torch.uint8) for c in codes]
            exact = [table[c] for c in codes]
        else:
            operands = [torch.randn(rows, k).to(torch.float8_e4m3fn) for rows in (m, n)]
            exact = [x.float() for x in operands]
        a, b = (
            x * (2.0 ** (s.float() - 127)).repeat_interleave(32, 1)
            for x, s in zip(exact, scales, strict=True)
        )
        c = torch.empty(m, n)
        tensors = operands[0], scales[0], operands[1], scales[1], c
        pack = 2 if fmt == "e2m1" else 1
        launch.launch(
            scaled_kernel, (1,), *tensors, M=m, N=n, K=k, FORMAT=tl.constexpr(fmt), PACK=pack
        )
        torch.testing.assert_close(c, a @ b.T, rtol=1e-5, atol=1e-5)
