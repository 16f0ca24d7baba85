"""Kernels of block-scaled numbers, interpreted or on a GPU, bit for bit against `reference`."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs

from experiments.mxfp4 import interpreter, layout, native, reference
from experiments.mxfp4.formats import FORMATS, Quantizer, ScaledTensor
from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.kernels import launch as launcher
from experiments.mxfp4.kernels.gemv import gemv
from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.kernels.quantize import quantize
from nanochat.kernels import rms_norm
from nanochat.kernels.launch import recording

BLOCK_SCALED = ((10, 0), (12, 0))  # capabilities whose tensor cores multiply blocks
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED, STREAM, SIGNS = 0x1234_5678_9ABC_DEF0, 5, 0x8A5C_3E71
QUANTIZERS = [
    Quantizer.parse(text)
    for text in (
        "mxfp4 even",
        "mxfp4 floor",
        "mxfp4 rceil",
        "mxfp4 rceil stochastic",
        "mxfp4 even hadamard",
        "mxfp4 rceil stochastic hadamard",
        "mxfp8_e4m3 even",
        "mxfp8_e5m2 rceil hadamard",
        "nvfp4",
        "nvfp4 stochastic",
    )
]


@pytest.fixture
def products_run() -> None:
    """Skip on a GPU where products of blocks would refuse to run."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() not in BLOCK_SCALED:
        pytest.skip("this GPU has no block-scaled tensor cores")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaN or the largest integer: what a kernel leaves unwritten shows."""
    make = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = make(*args, **kwargs)
        if x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
            return x
        return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", empty)


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """Multiples of 1/16 below 8 in 7 bits, rows of magnitudes 2^-8 to 2^8: sums of 32 are exact."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, columns), generator=generator) / 16
    powers = torch.randint(-8, 9, (rows, 1), generator=generator)
    return (x * torch.exp2(powers.float())).to(dtype).to(DEVICE)


def assert_same(got: ScaledTensor | None, want: ScaledTensor) -> None:
    assert got is not None
    assert (got.format, got.shape) == (want.format, want.shape)
    assert torch.equal(got.scales, want.scales)  # the padding too
    assert torch.equal(got.codes, want.codes)


def wanted(x: torch.Tensor, q: Quantizer, transposed: bool, **more: Any) -> ScaledTensor:
    scale = reference.tensor_scale(x) if q.format == "nvfp4" else None
    x = x.mT.contiguous() if transposed else x
    options: dict[str, Any] = {"seed": SEED, "stream": STREAM, "scale": scale} | more
    return reference.quantize(x, q, transposed=transposed, **options)


def of_kernel(x: torch.Tensor, q: Quantizer, columns: Quantizer | None, **more: Any) -> Any:
    options: dict[str, Any] = {
        "seed": torch.tensor(SEED, device=DEVICE),
        "stream": STREAM,
        "scale": reference.tensor_scale(x),
    }
    return quantize(x, q, columns, **(options | more))


@pytest.mark.parametrize("q", QUANTIZERS, ids=str)
def test_rows_and_columns_equal_the_reference(q: Quantizer) -> None:
    for shape in ((32, 32), (96, 160)):
        x = matrix(*shape)
        rows, columns = of_kernel(x, q, q)
        assert_same(rows, wanted(x, q, False))
        assert_same(columns, wanted(x, q, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_and_any_strides(dtype: torch.dtype) -> None:
    wide = matrix(40, 200, dtype)
    for x in (matrix(1, 64, dtype), matrix(7, 32, dtype), wide[3:8, 33:97], wide[:8].mT[:64].mT):
        rows, columns = quantize(x, Quantizer())
        assert columns is None
        assert_same(rows, wanted(x.contiguous(), Quantizer(), False))
    rows, columns = quantize(wide[:32, 33:97], None, Quantizer())
    assert rows is None
    assert_same(columns, wanted(wide[:32, 33:97], Quantizer(), True))


def test_float32_data_of_every_magnitude() -> None:
    """Ties, subnormals and the largest floats, in every mode."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16, 128, generator=generator)
    tails = torch.exp(8 * normal) * normal.sign()
    ties = torch.randint(-26, 27, (16, 128), generator=generator) / 4.0
    x = torch.cat([normal, tails, ties, normal * 1e-38, normal * 1e-42, normal.clamp(-3, 3) * 1e38])
    x = torch.cat([x, torch.zeros(16, 128)]).to(DEVICE)
    for mode in ("even", "floor", "rceil"):
        for name in ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"):
            rows, _ = quantize(x, Quantizer(name, mode))
            assert_same(rows, reference.quantize(x, Quantizer(name, mode)))


def test_each_orientation_has_its_own_quantizer() -> None:
    x = matrix(64, 128)
    eight, four = Quantizer("mxfp8_e4m3"), Quantizer(hadamard=True)
    rows, columns = quantize(x, eight, four)
    assert_same(rows, wanted(x, eight, False))
    assert_same(columns, wanted(x, four, True))


@pytest.mark.parametrize("text", ["mxfp4 even hadamard", "mxfp4 rceil stochastic hadamard"])
def test_signs_of_the_hadamard_transform(text: str) -> None:
    x, q = matrix(64, 96), Quantizer.parse(text)
    signs = torch.tensor(SIGNS, device=DEVICE)
    rows, columns = of_kernel(x, q, q, signs=signs)
    assert_same(rows, wanted(x, q, False, signs=signs))
    assert_same(columns, wanted(x, q, True, signs=signs))
    plain, _ = of_kernel(x, q, None)
    assert not torch.equal(plain.codes, rows.codes)


def test_tiles_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q = matrix(32, 160), Quantizer.parse("mxfp4 rceil stochastic")
    calls = [{"prologue": prologue} for prologue in ("none", "rms_norm")]
    first = [of_kernel(x, q, q, **call) for call in calls]
    tiles = {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4}
    monkeypatch.setattr("experiments.mxfp4.kernels.quantize.config", lambda name, target: tiles)
    for call, pair in zip(calls, first, strict=True):
        for one, other in zip(pair, of_kernel(x, q, q, **call), strict=True):
            assert_same(one, other)


QUANTIZED = [(Quantizer(), Quantizer()), (Quantizer("mxfp8_e4m3"), Quantizer(hadamard=True))]


@pytest.mark.parametrize(("rows", "columns"), QUANTIZED, ids=["mxfp4", "mxfp8 and hadamard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_relu2_fused_is_relu2_then_quantize(
    rows: Quantizer, columns: Quantizer, dtype: torch.dtype
) -> None:
    x = matrix(96, 160, dtype)
    post = x.float().relu().square().to(dtype)
    got = quantize(x, rows, columns, prologue="relu2")
    assert_same(got[0], wanted(post, rows, False))
    assert_same(got[1], wanted(post, columns, True))


@pytest.mark.parametrize(("rows", "columns"), QUANTIZED, ids=["mxfp4", "mxfp8 and hadamard"])
def test_rms_norm_fused_is_rms_norm_then_quantize(rows: Quantizer, columns: Quantizer) -> None:
    for shape in ((32, 96), (96, 160), (160, 384)):
        x = matrix(*shape)
        y = rms_norm.triton_rms_norm(x)
        got = quantize(x, rows, columns, prologue="rms_norm")
        assert_same(got[0], wanted(y, rows, False))
        assert got[1] is not None
        # a transform of unlike magnitudes: sums in another order differ in their last bit
        unlike = (got[1].codes != wanted(y, columns, True).codes).float().mean()
        assert unlike < 1e-3 * columns.hadamard + 1e-9


@pytest.mark.parametrize(
    ("text", "bad", "prologue"),
    [
        ("mxfp4", math.nan, "none"),
        ("mxfp4", math.inf, "none"),
        ("mxfp8_e4m3", -math.inf, "none"),
        ("nvfp4", math.nan, "none"),
        ("nvfp4", math.inf, "relu2"),
        ("mxfp4 hadamard", -math.inf, "none"),
        ("mxfp4", math.nan, "relu2"),
        ("mxfp4", math.nan, "rms_norm"),
        ("mxfp4", math.inf, "rms_norm"),
    ],
)
def test_nan_and_infinity_become_nan_blocks(text: str, bad: float, prologue: str) -> None:
    x = matrix(32, 64)
    x[3, 40] = bad
    q = Quantizer.parse(text)
    rows, columns = quantize(x, q, q, prologue=prologue, scale=torch.tensor(1.0, device=DEVICE))
    assert rows is not None
    assert columns is not None
    block = slice(32, 48) if text == "nvfp4" else slice(32, 64)
    assert reference.dequantize(rows)[3, block].isnan().all()
    assert reference.dequantize(columns)[40, :16].isnan().all()
    assert reference.dequantize(rows)[:3].isfinite().all()


def test_fused_arguments_are_checked() -> None:
    x = matrix(40, 64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rows": None}, "nothing to quantize"),
        ({"rows": Quantizer(), "prologue": "gelu"}, "choose one of none, relu2, rms_norm"),
        ({"rows": None, "columns": Quantizer()}, "40 columns do not divide into blocks of 32"),
        ({"rows": Quantizer.parse("mxfp4 rceil stochastic")}, "needs a seed"),
        ({"rows": Quantizer("nvfp4")}, "scale=reference.tensor_scale"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize(x, **arguments)


# Products


def operand(rows: int, columns: int, q: Quantizer, seed: int) -> ScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(DEVICE)
    return reference.quantize(x, q)


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


# Decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_gemv_is_within_rounding_of_float64(rows: int, dtype: torch.dtype) -> None:
    for n, k in ((8, 544), (70, 96)):
        w = operand(n, k, Quantizer(), 1)
        x = torch.randn(rows, k).to(dtype).to(DEVICE)
        want = x.double() @ reference.dequantize(w, torch.float64).mT
        eager = (x @ reference.dequantize(w, dtype).mT).double()
        got = gemv(x, w)
        assert got.dtype == dtype
        assert (got - want).square().mean() <= 4 * (eager - want).square().mean() + 1e-12


def test_gemv_reads_every_code_and_scale() -> None:
    """One-hot rows of x give back the columns of the weight, exactly."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    scales = torch.tensor([43, 44, 63, 64, 120, 127, 128, 140, 190, 191, 50, 99, 100, 110, 126, 90])
    w = ScaledTensor(
        codes.to(DEVICE), layout.swizzle_scales(scales.repeat(3, 1).to(torch.uint8)).to(DEVICE),
        "mxfp4", 512,
    )  # fmt: skip
    want = reference.dequantize(w)
    for start in range(0, 512, 48):
        x = torch.eye(512)[start : start + 16].to(DEVICE)
        assert torch.equal(gemv(x, w), want[:, start : start + 16].mT)


def test_gemv_arguments_are_checked() -> None:
    w = operand(8, 64, Quantizer(), 0)
    for x, weight, message in (
        (torch.zeros(17, 64), w, "1 to 16 rows, got 17"),
        (torch.zeros(1, 96), w, r"needs x \(M, 64\)"),
        (torch.zeros(1, 64), operand(8, 64, Quantizer("nvfp4"), 0), "and nvfp4"),
    ):
        with pytest.raises(ValueError, match=message):
            gemv(x.to(DEVICE), weight)


# Operations as torch.compile sees them


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


@pytest.mark.parametrize("dtype", interpreter.FLOAT8, ids=str)
def test_the_interpreter_converts_to_float8_as_ml_dtypes(dtype: tl.dtype) -> None:
    other = {"fp8e4nv": ml_dtypes.float8_e4m3fn, "fp8e5": ml_dtypes.float8_e5m2}[str(dtype)]
    limit = float(ml_dtypes.finfo(other).max)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).exp2() * 3
    x = torch.cat([x, -x, torch.arange(-600.0, 600.0) / 8, torch.tensor([0.0, 1e6, -1e6, 465.0])])
    bits = interpreter.to_float8(x.numpy(), dtype)
    assert np.array_equal(bits, x.numpy().clip(-limit, limit).astype(other).view(np.uint8))
    every = np.arange(256, dtype=np.uint8)
    values = interpreter.from_float8(every, dtype)
    assert np.array_equal(values, every.view(other).astype(np.float32), equal_nan=True)


# Nothing runs silently in another arithmetic


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU")
def test_without_a_gpu_nothing_is_native() -> None:
    for name in FORMATS:
        assert not native.is_native(name)
        with pytest.raises(NotNativeError, match="need a GPU, and there is none"):
            native.require_native(name)
    with pytest.raises(ValueError, match="choose one of mxfp4"):
        native.require_native("fp4")


@pytest.mark.skipif(not knobs.runtime.interpret, reason="Triton compiles here")
def test_the_interpreter_is_not_native() -> None:
    with pytest.raises(NotNativeError, match=r"on sm_120 with .* found: the interpreter"):
        native.require_native("mxfp4", "sm_120")


def test_a_gpu_is_asked_before_a_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose kernel would hold no block-scaled instruction; here it holds none at all."""
    a = operand(32, 64, Quantizer(), 0)
    monkeypatch.setattr(gemm, "target_of", lambda device: "sm_90")
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


def test_targets_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert launcher.target_of(torch.device("cuda")) == "sm_120"
    assert launcher.target_of(torch.device("cpu")) == "interpreter"
    with recording("sm_100"):
        assert launcher.target_of(torch.device("cpu")) == "sm_100"
    answers = [launcher.converts_to_e2m1(t) for t in ("sm_90", "sm_100", "sm_120", "interpreter")]
    assert answers == [False, True, True, False]


def test_tiles_of_a_gpu_without_its_own() -> None:
    kernel = "gemm.mxfp4.store"
    assert launcher.config(kernel, "sm_120") != launcher.config(kernel, "sm_100")
    assert launcher.config(kernel, "sm_100") == launcher.config(kernel, "interpreter")


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
