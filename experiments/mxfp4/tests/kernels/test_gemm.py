"""Products of block-scaled matrices against float64 products of the same operands."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.kernels.quantize import quantize
from experiments.mxfp4.numbers import reference
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor
from experiments.mxfp4.tests.support import (
    BLOCK_SCALED,
    DEVICE,
    assert_same,
    matrix,
    operand,
)
from nanochat.kernels.launch import recording


def exact(a: ScaledTensor, b: ScaledTensor) -> torch.Tensor:
    a64, b64 = (reference.dequantize(t, torch.float64) for t in (a, b))
    return a64 @ b64.mT


SHAPES = [(128, 128, 256), (1, 64, 32), (150, 140, 288)]


def products(name: str) -> Iterator[tuple[ScaledTensor, ScaledTensor]]:
    for (m, n, k), mode in zip(SHAPES, itertools.cycle(("even", "rceil", "floor"))):
        yield operand(m, k, Quantizer(name, mode), 1), operand(n, k, Quantizer(name, mode), 2)


@pytest.mark.usefixtures("products_run")
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_exact_where_float32_is(name: str) -> None:
    """Products of E2M1 are multiples of 1/4 of their scales: their float32 sums do not round."""
    for a, b in products(name):
        want = exact(a, b)
        got = gemm.matmul(a, b, torch.float32).double()
        if name == "mxfp4":
            assert torch.equal(got, want)
        # elsewhere sums round, in an order of the GPU's choice
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()
        sixteen = gemm.matmul(a, b)
        assert sixteen.dtype == torch.bfloat16
        assert (sixteen.double() - want).abs().max() <= 2**-8 * want.abs().max()


@pytest.mark.usefixtures("products_run")
@pytest.mark.parametrize("name", FORMATS)
def test_products_add_to_a_gradient(name: str) -> None:
    for (a, b), splits in zip(products(name), (1, 1, 3), strict=True):
        want = exact(a, b)
        out = torch.randint(-8, 8, want.shape).float().to(DEVICE)
        gradient = out.double() + want
        gemm.matmul_add_(out, a, b, splits)
        tolerance = 2e-6 * gradient.abs().max()
        assert (out.double() - gradient).abs().max() <= (0 if name == "mxfp4" else tolerance)


@pytest.mark.usefixtures("products_run")
def test_split_k_reads_every_block_once() -> None:
    a, b = operand(32, 1280, Quantizer(), 1), operand(32, 1280, Quantizer(), 2)
    for splits in (0, 2, 5, 8):
        out = torch.zeros(32, 32, device=DEVICE)
        gemm.matmul_add_(out, a, b, splits)
        assert torch.equal(out.double(), exact(a, b))


@pytest.mark.usefixtures("products_run")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("text", ["mxfp4 even", "mxfp8_e4m3 even", "mxfp4 even hadamard"])
def test_relu2_ends_as_the_separate_operations(text: str, keep: bool) -> None:
    q = Quantizer.parse(text)
    for m, n, k in ((128, 128, 256), (150, 160, 288)):
        a, b = operand(m, k, Quantizer(), 1), operand(n, k, Quantizer(), 2)
        post = exact(a, b).float().relu().square().bfloat16()
        if q.hadamard:  # so that the transform's sums are exact
            post = torch.full_like(post, 0.25)
            a, b = (_quarters(*t.shape) for t in (a, b))
            post = exact(a, b).float().relu().square().bfloat16()
        got, kept = gemm.matmul_relu2(a, b, q, keep)
        assert_same(got, reference.quantize(post, q))
        assert (kept is not None) == keep
        assert kept is None or torch.equal(kept, post)


def _quarters(rows: int, columns: int) -> ScaledTensor:
    """One element 1/2 or 1 a row: products are 0, 1/4, 1/2 or 1."""
    x = torch.zeros(rows, columns, device=DEVICE)
    r = torch.arange(rows, device=DEVICE)
    x[r, r % 4] = 2.0 ** -(r % 2)
    return reference.quantize(x, Quantizer())


@pytest.mark.usefixtures("products_run")
def test_nan_blocks_stay_visible_in_products() -> None:
    x = torch.randn(8, 64)
    x[3, 40] = math.nan
    a = reference.quantize(x.to(DEVICE), Quantizer(), propagate=True)
    y = gemm.matmul(a, operand(8, 64, Quantizer(), 2))
    assert y[3].isnan().all()
    assert y[:3].isfinite().all()


def test_operands_are_checked() -> None:
    four, eight = operand(4, 64, Quantizer(), 0), operand(4, 64, Quantizer("mxfp8_e4m3"), 0)
    out = torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"one K, got mxfp4 .* and mxfp8_e4m3"):
        gemm.matmul(four, eight)
    with pytest.raises(ValueError, match="one format and one K"):
        gemm.matmul(four, operand(4, 96, Quantizer(), 0))
    with pytest.raises(ValueError, match="contiguous float32"):
        gemm.matmul_add_(out.bfloat16(), four, four)
    with pytest.raises(ValueError, match=r"out is \(4, 4\), a b\^T is \(4, 5\)"):
        gemm.matmul_add_(out, four, operand(5, 64, Quantizer(), 0))
    with pytest.raises(ValueError, match="use matmul, then quantize"):
        gemm.matmul_relu2(four, four, Quantizer("nvfp4"))
    with pytest.raises(ValueError, match="N = 4 does not divide into blocks of 32"):
        gemm.matmul_relu2(four, four, Quantizer())


def test_split_k_fills_the_gpu() -> None:
    assert gemm.split_k(tiles=36, steps=256, programs=170) == 4  # 144 of 170 at once
    assert gemm.split_k(tiles=108, steps=256, programs=170) in (3, 6)
    assert gemm.split_k(tiles=3000, steps=256, programs=170) == 1
    assert gemm.split_k(tiles=1, steps=256, programs=170) == gemm.SPLITS_MAX
    assert gemm.split_k(tiles=1, steps=2, programs=170) == 1  # parts cost more than they save
    assert gemm.split_k(tiles=1, steps=1, programs=1) == 1


@pytest.mark.long
@pytest.mark.usefixtures("products_run")
def test_operations_keep_their_contracts() -> None:
    x, q = matrix(32, 64), str(Quantizer())
    seed = torch.tensor(1, device=DEVICE)
    torch.library.opcheck(torch.ops.mxfp4.quantize, (x, q, "", "none", None, 0, None, None))
    stochastic = "mxfp4 rceil stochastic hadamard"
    arguments = (x, "nvfp4", stochastic, "relu2", seed, 3, seed, torch.ones((), device=DEVICE))
    torch.library.opcheck(torch.ops.mxfp4.quantize, arguments)
    a, b = operand(32, 64, Quantizer(), 1), operand(64, 64, Quantizer(), 2)
    pair = (a.codes, a.scales, None, b.codes, b.scales, None, "mxfp4")
    torch.library.opcheck(torch.ops.mxfp4.matmul, (*pair, torch.bfloat16))
    out = torch.zeros(32, 64, device=DEVICE)
    torch.library.opcheck(torch.ops.mxfp4.matmul_add_, (out, *pair, 1))
    torch.library.opcheck(torch.ops.mxfp4.matmul_relu2, (*pair, q, True))
    torch.library.opcheck(torch.ops.mxfp4.gemv, (x[:2], b.codes, b.scales))


@pytest.mark.usefixtures("products_run")
def test_products_trace_without_a_graph_break() -> None:
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q = Quantizer(hadamard=True)
        a, _ = quantize(x, q)
        b, _ = quantize(w, q)
        assert a is not None
        assert b is not None
        return gemm.matmul(a, b)

    x, w = matrix(32, 64), matrix(64, 64, seed=1)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), product(x, w))


def test_a_gpu_is_asked_before_a_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose kernel would hold no block-scaled instruction; here it holds none at all."""
    a = operand(32, 64, Quantizer(), 0)
    monkeypatch.setattr(gemm, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr("experiments.mxfp4.kernels.ptx.compile_for", lambda *launch: FakeKernel)
    for call in (
        lambda: gemm.matmul(a, a),
        lambda: gemm.matmul_add_(torch.zeros(32, 32, device=DEVICE), a, a),
        lambda: gemm.matmul_relu2(a, a, Quantizer()),
    ):
        with pytest.raises(NotNativeError, match=r"mxfp4 products on sm_90 with Triton "):
            call()


class FakeKernel:
    asm = {"ptx": "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {};"}


@pytest.mark.gpu
def test_products_refuse_gpus_without_the_instruction() -> None:
    if torch.cuda.get_device_capability() in BLOCK_SCALED:
        pytest.skip("this GPU has the instruction")
    a = operand(128, 256, Quantizer(), 0)
    with pytest.raises(NotNativeError, match="do not run on block-scaled tensor cores; found: "):
        gemm.matmul(a, a)


def test_recorded_launches_ask_nothing() -> None:
    """A forecast or an ahead-of-time build records on any machine."""
    with recording("sm_120") as recorder:
        gemm.matmul(operand(128, 256, Quantizer(), 0), operand(128, 256, Quantizer(), 0))
    assert [launch.options["ELEMENT"] for launch in recorder.launches] == ["e2m1"]
