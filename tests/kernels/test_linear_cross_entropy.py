"""The chunked loss: chunks, options, memory, the gradients that wait for their scale."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.kernels import (
    launch,
    linear_cross_entropy,
    linear_cross_entropy_chunks,
    linear_cross_entropy_kernels,
)
from nanochat.kernels.linear_cross_entropy import reference, triton_chunked, triton_min_memory
from nanochat.kernels.linear_cross_entropy_chunks import (
    _accumulate,
    chunk_rows,
    chunked,
    extra_bytes,
    times,
)
from nanochat.kernels.linear_cross_entropy_kernels import ROW, loss_kernel, row_kernel
from nanochat.kernels.workloads import WORKLOADS

BOTH = pytest.mark.parametrize("call", [triton_chunked, triton_min_memory])
aten = torch.ops.aten
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_chunk_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(linear_cross_entropy_chunks, "chunk_rows", lambda x, V, small: rows)


@pytest.fixture
def three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(monkeypatch, 3)


def inputs(N: int = 11, D: int = 24, V: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(100, (N,), device=HERE)
    targets[::4] = -1
    x, weight = torch.randn(N, D, device=HERE), torch.randn(V, D, device=HERE)
    return x.requires_grad_(), weight.requires_grad_(), targets


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def results(call: Callable[..., Tensor], scale: Tensor, **options: Any) -> list[Tensor]:
    x, weight, targets = inputs()
    loss = call(x, weight, targets, 15.0, 100, **options)
    (loss * scale).sum().backward()
    return [loss, gradient(x), gradient(weight)]


@pytest.mark.long
@BOTH
@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_chunks_add_up(call: Callable[..., Tensor], reduction: str, z_loss: float) -> None:
    scale = (
        torch.linspace(-2, 3, 11, device=HERE)
        if reduction == "none"
        else torch.tensor(0.37, device=HERE)
    )
    want = results(reference, scale, reduction=reduction, z_loss=z_loss)
    got = results(call, scale, reduction=reduction, z_loss=z_loss)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@BOTH
def test_shape_of_the_targets_is_kept(call: Callable[..., Tensor]) -> None:
    x, weight, targets = inputs(12)
    x, targets = x.view(3, 4, -1), targets.view(3, 4)
    got = call(x, weight, targets, 15.0, 100, "none")
    torch.testing.assert_close(got, reference(x, weight, targets, 15.0, 100, "none"))
    assert got.shape == (3, 4)


@BOTH
def test_large_logits_stay_finite(call: Callable[..., Tensor]) -> None:
    x, weight, targets = inputs()
    loss = call(1e4 * x, weight, targets, 15.0, 100)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(x)).all()


@BOTH
def test_no_valid_target_is_zero_and_moves_nothing(call: Callable[..., Tensor]) -> None:
    x, weight, targets = inputs()
    loss = call(x, weight, torch.full_like(targets, -1), 15.0, 100)
    loss.backward()
    assert loss.item() == 0
    assert not gradient(x).any()
    assert not gradient(weight).any()


@BOTH
def test_padding_rows_of_the_head_get_no_gradient(call: Callable[..., Tensor]) -> None:
    x, weight, targets = inputs()
    call(x, weight, targets, 15.0, 100).backward()
    assert not gradient(weight)[100:].any()
    assert gradient(weight)[:100].any()


def test_scale_of_the_gradient_is_not_rounded_to_sixteen_bits() -> None:
    """1 + 2^-8 would become 1 in bfloat16, and every gradient too short."""
    x, weight, targets = (t.detach() for t in inputs(64, 96))
    gradients = []
    for scale in (1.0, 1 + 2**-8):
        leaf = x.bfloat16().requires_grad_()
        loss = triton_chunked(leaf, weight.bfloat16(), targets, 15.0, 100, "sum")
        (loss * scale).backward()
        gradients.append(gradient(leaf))
    assert torch.equal(gradients[1], (gradients[0].float() * (1 + 2**-8)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_the_weight_is_summed_in_float32(dtype: torch.dtype) -> None:
    """A chunk of 2^-12 on a sum of 1, which 16 bits would lose."""
    dw = torch.ones(16, 8, device=HERE)
    dlogits = torch.full((4, 16), 2**-14, dtype=dtype, device=HERE)
    _accumulate(dw, dlogits, torch.ones(4, 8, dtype=dtype, device=HERE), first=False)
    assert torch.equal(dw, torch.full_like(dw, 1 + 2**-12))


@BOTH
def test_targets_may_lie_apart(call: Callable[..., Tensor]) -> None:
    x, weight, targets = inputs()
    apart = torch.stack((targets, torch.zeros_like(targets)), dim=-1)[:, 0]
    assert torch.equal(call(x, weight, apart, 15.0, 100), call(x, weight, targets, 15.0, 100))


@BOTH
def test_no_row_is_a_loss_of_zero(call: Callable[..., Tensor]) -> None:
    x, weight, targets = inputs()
    loss = call(x[:0], weight, targets[:0], 15.0, 100)
    loss.backward()
    assert loss.item() == 0
    assert not gradient(weight).any()


@BOTH
@pytest.mark.parametrize("target", [100, 127, 128, 2**40, -2])
def test_target_outside_the_vocabulary_is_nan_and_reads_nothing(
    call: Callable[..., Tensor], target: int
) -> None:
    x, weight, targets = inputs()
    targets[2] = target
    losses = call(x, weight, targets, 15.0, 100, "none")
    assert losses.isnan().nonzero().tolist() == [[2]]


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(10, dtype=torch.int64)}, r"give it shape \(10, 24\)"),
        ({"weight": torch.zeros(128, 23)}, r"give it shape \(11, 23\)"),
        ({"vocab_size": 129}, r"129 is not in 1\.\.128"),
        ({"vocab_size": 0}, r"0 is not in 1\.\.128"),
        ({"softcap": 41.0}, "linear_cross_entropy=reference"),
        ({"softcap": 0.0}, "linear_cross_entropy=reference"),
        ({"reduction": "average"}, "'average' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(
    call: Callable[..., Tensor], change: dict[str, Any], message: str
) -> None:
    x, weight, targets = inputs()
    with pytest.raises(ValueError, match=message):
        call(**{"x": x, "weight": weight, "targets": targets, **change})


@BOTH
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignore_index_is_an_argument(call: Callable[..., Tensor], ignore_index: int) -> None:
    """Also where it is a token: then that token is never a target."""
    want, got = inputs(), inputs()
    for (x, weight, targets), compute in ((want, reference), (got, call)):
        targets[targets < 0] = ignore_index
        targets[1] = 7
        compute(x, weight, targets, 15.0, 100, ignore_index=ignore_index).backward()
    for w, g in zip(want[:2], got[:2], strict=True):
        torch.testing.assert_close(gradient(g), gradient(w), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("V", [300, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch, V: int, dtype: torch.dtype) -> None:
    """A row of bfloat16 fits into the registers up to 65,536; the rest is read twice."""
    kernels = []
    monkeypatch.setattr(
        linear_cross_entropy_kernels, "launch", lambda kernel, *a, **k: kernels.append(kernel)
    )
    chunked(
        torch.zeros(2, 8, dtype=dtype), torch.zeros(V, 8, dtype=dtype), torch.zeros(2).long(),
        None, 15.0, V, 0.0, -1, True, False,
    )  # fmt: skip
    in_registers = dtype == torch.bfloat16 and V == 300
    assert kernels == [row_kernel if in_registers else loss_kernel]


@pytest.mark.parametrize("columns", [(300, 320), (128, 128), (1000, 4096)])
def test_row_in_registers_rounds_twice_and_no_more(columns: tuple[int, int]) -> None:
    """The kernel alone against the formulas in float64: 2^-8 of each element at a time."""
    torch.manual_seed(0)
    V, padded = columns
    z_loss = 0.02
    logits = torch.full((6, padded), math.nan, device=HERE).bfloat16()
    logits[:, :V] = 20 * torch.randn(6, V, device=HERE)
    targets = torch.tensor([0, 1, V - 1, 63, -5, 5], device=HERE)
    scales = torch.tensor([1.0, -3.0, 0.5, 1.0, 1.0, 1e-6], device=HERE)
    exact = logits[:, :V].double().requires_grad_()
    z = 15.0 * torch.tanh(exact / 15.0)
    lse = z.logsumexp(dim=-1)
    want = lse - z.gather(1, targets.clamp(min=0)[:, None])[:, 0] + z_loss * lse.square()
    want = want * (targets != -5)
    (want * scales).sum().backward()
    losses = torch.empty(6, device=HERE)
    launch.launch(
        row_kernel, (6,), logits, targets, scales, losses, 15.0, z_loss, padded, -5, V=V,
        PADDED=padded, SCALED=True, **(ROW.choose(logits, padded) | {"BLOCK": 128}),
    )  # fmt: skip
    torch.testing.assert_close(losses.double(), want.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        logits[:, :V].double(), gradient(exact), rtol=1.02 * 2**-7, atol=1e-12
    )
    assert not logits[:, V:].any()


@pytest.mark.parametrize("softcap", [0.5, 15.0, 40.0])
def test_every_digit_of_a_gradient_from_tiny_to_capped_logits(softcap: float) -> None:
    """The kernel alone against the formulas in float64, on the logits it was given."""
    torch.manual_seed(0)
    V, z_loss = 300, 0.02
    logits = torch.randn(6, V, device=HERE) * softcap
    logits *= torch.tensor([[0.0], [1e-6], [1e-3], [0.1], [1.0], [3.0]], device=HERE)
    targets = torch.tensor([0, 1, 299, 3, 4, 5], device=HERE)
    exact = logits.double().requires_grad_()
    z = softcap * torch.tanh(exact / softcap)
    lse = z.logsumexp(dim=-1)
    want = lse - z.gather(1, targets[:, None])[:, 0] + z_loss * lse.square()
    want.sum().backward()
    losses = torch.empty(6, device=HERE)
    launch.launch(
        loss_kernel, (6,), logits, targets, losses, losses, softcap, z_loss, V, -1, V=V, PADDED=V,
        GRADIENTS=True, SCALED=False, BLOCK=128, num_warps=4, num_stages=1,
    )  # fmt: skip
    torch.testing.assert_close(losses.double(), want.detach(), rtol=2e-6, atol=2e-6)
    # relative to the largest of its row: the target's own, of another size than p
    error = (logits - gradient(exact)).abs().amax(dim=1) / gradient(exact).abs().amax(dim=1)
    assert error.max() < 2e-5


def test_rows_more_than_two_billion_elements_apart() -> None:
    V, stride = 64, 2**30
    torch.manual_seed(0)
    rows = torch.randn(3, V, device=HERE)
    far = torch.empty(2 * stride + V, dtype=torch.float16, device=HERE)
    far = far.as_strided((3, V), (stride, 1)).copy_(rows)
    targets, losses = torch.tensor([1, 2, 3], device=HERE), torch.empty(3, device=HERE)
    launch.launch(
        loss_kernel, (3,), far, targets, losses, losses, 15.0, 0.0, stride, -1, V=V, PADDED=V,
        GRADIENTS=True, SCALED=False, BLOCK=64, num_warps=1, num_stages=1,
    )  # fmt: skip
    z = 15 * torch.tanh(rows.half().float() / 15)
    want = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)


def test_without_gradients_nothing_is_made_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = inputs()
    with torch.no_grad():
        losses, dx, dw = chunked(x, weight, targets, None, 15.0, 100, 0.0, -1, False, False)
    assert losses.shape == (11,)
    assert dx.numel() == dw.numel() == 0
    made = []
    real = launch.launch
    monkeypatch.setattr(
        linear_cross_entropy_kernels,
        "launch",
        lambda *a, **k: (made.append(k["GRADIENTS"]), real(*a, **k)),
    )
    with torch.no_grad():
        triton_chunked(x, weight, targets, 15.0, 100)
    assert made == [False]


class PeakBytes(TorchDispatchMode):
    """Most bytes alive at once in storages that operations made."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.given:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("rows", [4, 96])
def test_extra_memory_is_what_it_says(
    monkeypatch: pytest.MonkeyPatch, recomputed: bool, rows: int
) -> None:
    """Forward and backward: the chunks are the most with many rows, the end with few."""
    N, D, V = 128, 48, 512
    set_chunk_rows(monkeypatch, rows)
    monkeypatch.setattr(linear_cross_entropy_kernels, "launch", lambda *a, **k: None)
    # in place on a GPU; the CPU's detour over float32 operands is not the operation's
    monkeypatch.setattr(linear_cross_entropy_chunks, "_accumulate", lambda *a: None)
    # the allocations of a custom operation show when it is called as a plain function
    monkeypatch.setattr(linear_cross_entropy, "chunked", chunked._init_fn)
    monkeypatch.setattr(linear_cross_entropy, "times", times._init_fn)
    x = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V, (N,))
    call = triton_min_memory if recomputed else triton_chunked
    with PeakBytes(x, weight, targets) as peak:
        call(x, weight, targets, reduction="sum").backward()
    foreseen = extra_bytes(N, D, V, rows, 2, recomputed)
    assert foreseen <= peak.peak <= 1.02 * foreseen


def test_sixty_five_thousand_tokens_take_less_than_one_and_a_half_gigabytes() -> None:
    w = WORKLOADS["d20"]
    like = torch.empty(w.tokens, w.width, dtype=torch.bfloat16, device="meta")
    for architecture in ("sm_90", "sm_120", launch.GENERIC):
        with launch.recording(architecture):
            rows, few = (chunk_rows(like, w.vocab_size, small) for small in (False, True))
        sizes = w.tokens, w.width, w.vocab_size
        assert 0.5e9 < 2 * rows * w.vocab_size < 1.1e9
        assert extra_bytes(*sizes, rows, 2) < 1.5e9
        assert extra_bytes(*sizes, few, 2, recomputed=True) < 0.7e9


def test_min_memory_keeps_nothing_but_its_inputs() -> None:
    x, weight, targets = inputs()
    kept = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        triton_min_memory(x, weight, targets, 15.0, 100, "sum")
    assert kept == [x.shape, weight.shape, targets.shape]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks_are_small_only_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    asked = []

    def rows(x: Tensor, V: int, small: bool) -> int:
        asked.append(small)
        return 4

    monkeypatch.setattr(linear_cross_entropy_chunks, "chunk_rows", rows)
    for call, small in ((triton_chunked, False), (triton_min_memory, True)):
        x, weight, targets = inputs()
        call(x, weight, targets, 15.0, 100, reduction).sum().backward()
        assert set(asked) == {small}
        asked.clear()


class NoSync(TorchDispatchMode):
    """Raises where a value of a tensor would go to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_host_waits_for_no_value(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Tensor], reduction: str
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "chunked", chunked._init_fn)
    monkeypatch.setattr(linear_cross_entropy, "times", times._init_fn)
    x, weight, targets = inputs()
    with NoSync():
        call(x, weight, targets, 15.0, 100, reduction).sum().backward()


def test_fake_strides_are_the_real_ones() -> None:
    """Inductor refuses an operation whose outputs lie otherwise than it was told."""
    x, weight, targets = (t.detach() for t in inputs())
    x = x.mT.contiguous().mT
    real = chunked(x, weight, targets, None, 15.0, 100, 0.0, -1, True, False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, targets)]
        fake = chunked(*fakes, None, 15.0, 100, 0.0, -1, True, False)
    assert [(f.shape, f.stride(), f.dtype) for f in fake] == [
        (r.shape, r.stride(), r.dtype) for r in real
    ]


@pytest.mark.gpu
@BOTH
def test_extra_memory_on_a_gpu(call: Callable[..., Tensor]) -> None:
    N, D, V = 65_536, 1280, 65_536
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    call(x[:1], weight, targets[:1]).backward()  # the workspace of cuBLAS is no part of the call
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(x, weight, targets).backward()
    torch.cuda.synchronize()
    small = call is triton_min_memory
    foreseen = extra_bytes(N, D, V, chunk_rows(x, V, small), 2, recomputed=small)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * foreseen < 1.5e9
