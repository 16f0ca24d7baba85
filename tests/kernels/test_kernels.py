"""Every implementation of every operation, over its examples, against its reference in float64.

The operations are those that `registry.operations` finds: a new file in nanochat/kernels is tested
here without a line in this one.
"""

import math
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.kernels import (
    attention,
    linear_cross_entropy,
    linear_cross_entropy_chunks,
    qk_norm_rope,
    rms_norm,
)
from nanochat.kernels.registry import Choice, Op, format_choices, operations, select
from nanochat.kernels.roofline import bound, speed_of_light

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
ABSOLUTE = 1e-6
CASES = [(op, name) for op in operations().values() for name in op.implementations]
ON_DEVICES = [
    pytest.param(op, name, CPU, id=f"{op.name}-{name}-cpu")
    for op, name in CASES
    if not op.implementations[name].needs(CPU, torch.float32)
] + [
    pytest.param(op, name, CUDA, id=f"{op.name}-{name}-cuda", marks=pytest.mark.gpu)
    for op, name in CASES
]
TRITON_CASES = [(op, name) for op, name in CASES if name.startswith("triton")]
HERE = CUDA if torch.cuda.is_available() else CPU  # where Triton compiles, or is interpreted


def ids(cases: list[tuple[Op, str]]) -> list[str]:
    return [f"{op.name}-{name}" for op, name in cases]


def same_layout(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy with the strides of x, gaps included."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(x.detach())


def run(call: Any, args: tuple[Any, ...], exact: bool = False) -> list[torch.Tensor]:
    """Outputs, then the gradient of every floating-point argument that has one, in float64.

    Of an operation in place, which returns None, the arguments after the call.

    exact  also computes in float64, whatever the dtypes of the arguments.
    """

    def leaf(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            return same_layout(arg, torch.float64 if exact else arg.dtype).requires_grad_()
        return torch.float64 if exact and isinstance(arg, torch.dtype) else arg

    leaves = [leaf(arg) for arg in args]
    outputs = call(*leaves)
    if outputs is None:
        return [x.detach().double() for x in leaves if isinstance(x, torch.Tensor)]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not any(y.requires_grad for y in outputs):
        return [y.double() for y in outputs]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    total = sum((y.double() * w.to(y.device)).sum() for y, w in zip(outputs, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    total.backward()
    gradients = [
        leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    return [x.detach().double() for x in (*outputs, *(g for g in gradients if g is not None))]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like hand out NaN (or the largest integer), never zeros."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            if x.device.type == "meta" or isinstance(x, FakeTensor):
                return x
            return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.long
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "name", "device"), ON_DEVICES)
def test_error_is_within_its_multiple_of_eager(
    op: Op, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    implementation = op.implementations[name]
    refusal = implementation.needs(device, dtype)
    if refusal:
        pytest.skip(refusal)
    torch.manual_seed(0)
    for args in op.examples(device, dtype):
        want = run(op.reference, args, exact=True)
        eager = run(op.reference, args)
        got = run(implementation.call, args)
        assert len(got) == len(want)
        for index, (g, e, w) in enumerate(zip(got, eager, want, strict=True)):
            assert torch.isfinite(g).all(), (index, tuple(w.shape))
            allowed = implementation.error * rms(e - w) + ABSOLUTE * max(1.0, rms(w))
            assert rms(g - w) <= allowed, (index, tuple(w.shape))
        again = run(implementation.call, args)
        assert all(torch.equal(g, a) for g, a in zip(got, again, strict=True))


def permuted(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """x laid out with two of its axes exchanged."""
    if x.dim() < 2:
        return x
    first, second = first % x.dim(), second % x.dim()
    return x.transpose(first, second).contiguous().transpose(first, second)


def spread(x: torch.Tensor) -> torch.Tensor:
    """x in every second element of its memory."""
    return torch.stack((x, x), dim=-1)[..., 0]


@pytest.mark.long
@pytest.mark.parametrize(("op", "name"), TRITON_CASES, ids=ids(TRITON_CASES))
def test_gradients_may_have_any_strides(op: Op, name: str) -> None:
    for args in op.examples(HERE, torch.float32):
        leaves = [
            arg.detach().requires_grad_()
            if isinstance(arg, torch.Tensor) and arg.is_floating_point()
            else arg
            for arg in args
        ]
        outputs = op.implementations[name].call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not any(y is not None and y.requires_grad for y in outputs):
            pytest.skip(f"{op.name} is not differentiated")
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        dense = [torch.randn(y.shape, device=HERE) for y in outputs]
        ones = [torch.ones(y.shape, device=HERE) for y in outputs]
        for plain, strided in (
            (dense, [permuted(dy, 0, -2) for dy in dense]),
            (dense, [spread(dense[0]), *dense[1:]]),
            (dense, [permuted(dense[0], -2, -3), *dense[1:]]),
            (ones, [torch.ones((), device=HERE).expand(dy.shape) for dy in ones]),
        ):
            want, got = (
                torch.autograd.grad(outputs, wanted, dys, retain_graph=True, allow_unused=True)
                for dys in (plain, strided)
            )
            for w, g in zip(want, got, strict=True):
                assert w is None or torch.equal(w, g)


class CustomOpCalls(TorchDispatchMode):
    """Keeps the arguments of the first call of each custom operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "nanochat":
            kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.setdefault(func, tuple(kept))
        return func(*args, **(kwargs or {}))


@pytest.mark.long
@pytest.mark.parametrize(("op", "name"), TRITON_CASES, ids=ids(TRITON_CASES))
def test_custom_operations_keep_their_contracts(op: Op, name: str) -> None:
    args = next(iter(op.examples(HERE, torch.float32)))
    with CustomOpCalls() as recorder:
        run(op.implementations[name].call, args)
    assert recorder.calls
    for func, arguments in recorder.calls.items():
        torch.library.opcheck(func, arguments)


@pytest.mark.long
@pytest.mark.parametrize(("op", "name"), TRITON_CASES, ids=ids(TRITON_CASES))
def test_triton_traces_without_a_graph_break(op: Op, name: str) -> None:
    args = next(iter(op.examples(HERE, torch.float32)))
    call = op.implementations[name].call
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, got = run(call, args), run(compiled, args)
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    memory = torch.zeros(2**31 + 2**12, device="cuda", dtype=torch.bfloat16)
    x = memory.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64, device="cuda"))
    x.requires_grad_()
    rms_norm.triton_rms_norm(x).sum().backward()
    dense = x.detach().clone().requires_grad_()
    rms_norm.triton_rms_norm(dense).sum().backward()
    assert torch.equal(rms_norm.triton_rms_norm(x), rms_norm.triton_rms_norm(dense))
    assert torch.equal(x.grad, dense.grad)


@pytest.mark.gpu
def test_logits_beyond_two_to_the_31_elements() -> None:
    """A chunk of 40,000 rows: what a larger chunk in a table would launch."""
    x = torch.randn(40_000, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(65_536, 16, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(65_536, (40_000,), device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy_chunks, "chunk_rows", lambda x, V, small: 40_000)
        whole = linear_cross_entropy.triton_chunked(x, weight, targets, reduction="none")
    assert torch.equal(
        whole, linear_cross_entropy.triton_chunked(x, weight, targets, reduction="none")
    )


def test_rms_norm_by_hand() -> None:
    y = rms_norm.rms_norm(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert torch.allclose(y, torch.tensor([[3.0, 4.0]], dtype=torch.float64) / 12.5**0.5)


def test_rotation_is_by_minus_theta_on_halves() -> None:
    cos, sin = qk_norm_rope.rotary_tables(4, 4, 10_000.0, "cpu")
    qkv = torch.zeros(1, 4, 12)
    qkv[..., 0] = 1.0  # first channel of the query's first half
    q, _, _ = qk_norm_rope.reference(qkv, cos, sin, 1, 1)
    position = torch.arange(4.0)
    # norm of a unit vector of 4 channels: mean square 1/4, so the norm doubles it
    assert torch.allclose(q[0, :, 0, 0], 2 * position.cos(), atol=1e-5)
    assert torch.allclose(q[0, :, 0, 2], -2 * position.sin(), atol=1e-5)


def test_offsets_continue_a_sequence() -> None:
    torch.manual_seed(0)
    cos, sin = qk_norm_rope.rotary_tables(16, 8, 10_000.0, "cpu")
    qkv = torch.randn(2, 9, 32)
    whole = qk_norm_rope.reference(qkv, cos, sin, 2, 1)
    tail = qk_norm_rope.reference(qkv[:, 5:], cos, sin, 2, 1, torch.tensor([5, 5]))
    for w, t in zip(whole, tail, strict=True):
        assert torch.equal(w[:, 5:], t)


def test_attention_is_causal_windowed_and_respects_lengths() -> None:
    mask = attention.visible(2, 5, CPU, window=2, kv_lengths_B=torch.tensor([3, 5]))
    assert mask.shape == (2, 1, 2, 5)
    assert mask[0, 0].tolist() == [
        [True, True, False, False, False],
        [False, True, True, False, False],
    ]
    assert mask[1, 0, 1].tolist() == [False, False, False, True, True]


def test_loss_without_targets_is_zero() -> None:
    targets = torch.full((3,), -1)
    loss = linear_cross_entropy.reference(torch.randn(3, 4), torch.randn(8, 4), targets)
    assert loss.item() == 0.0


def test_padding_of_the_vocabulary_does_not_count() -> None:
    x, weight, targets = torch.randn(5, 4), torch.randn(8, 4), torch.tensor([0, 1, 2, 3, 4])
    want = linear_cross_entropy.reference(x, weight[:6], targets)
    got = linear_cross_entropy.reference(x, weight, targets, vocab_size=6)
    assert torch.equal(want, got)


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="'average' is unknown"):
        linear_cross_entropy.reference(
            torch.randn(1, 4), torch.randn(8, 4), torch.tensor([0]), reduction="average"
        )


@pytest.fixture
def restored():
    yield
    for op in operations().values():
        op.use("reference")


@pytest.mark.usefixtures("restored")
class TestSelect:
    def test_auto_takes_the_last_usable(self) -> None:
        chosen = {c.op: c.implementation for c in select("auto", CPU, torch.float32)}
        assert chosen["attention"] == "sdpa"
        assert attention.attention.selected == "sdpa"

    def test_one_operation_by_name(self) -> None:
        chosen = {c.op: c for c in select("auto,attention=reference", CPU, torch.float32)}
        assert chosen["attention"].implementation == "reference"
        assert "asked for" in format_choices(list(chosen.values()))

    def test_the_table_has_a_short_line_for_each_operation(self) -> None:
        refused = {"triton": "a very long reason " * 20, "other": "another"}
        choices = [*select("auto", CPU, torch.float32), Choice("x", "reference", "auto", refused)]
        head, *lines = format_choices(choices).splitlines()
        assert head == "kernels"
        assert [line.split()[:2] for line in lines] == [[c.op, c.implementation] for c in choices]
        assert all(len(line) <= 100 for line in lines)
        assert lines[-1].endswith("...")
        whole = format_choices(choices, verbose=True)
        assert "not triton: a very long reason" in whole
        assert whole.endswith("; not other: another")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("atention=sdpa", "did you mean 'attention'"),
            ("attention=sdpq", "did you mean 'sdpa'"),
            ("referense", "did you mean 'reference'"),
        ],
    )
    def test_near_misses_are_named(self, spec: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            select(spec, CPU, torch.float32)

    def test_refusal_changes_nothing(self) -> None:
        op = rms_norm.rms_norm
        op.add("impossible", op.reference, lambda device, dtype: "no such machine")
        try:
            select("auto", CPU, torch.float32)
            with pytest.raises(ValueError, match="no such machine"):
                select("reference,rms_norm=impossible", CPU, torch.float32)
            assert attention.attention.selected == "sdpa"
            refused = {c.op: c.refused for c in select("auto", CPU, torch.float32)}
            assert refused["rms_norm"]["impossible"] == "no such machine"
            assert "interpreted" in refused["rms_norm"]["triton"]
        finally:
            del op.implementations["impossible"]


def test_speed_of_light_is_the_larger_term() -> None:
    x = torch.empty(1000, 1000)
    cost = rms_norm.cost(x)
    assert cost.bytes == 8e6
    assert speed_of_light(cost, 1e15, 1e12) == 8e-6
    assert bound(cost, 1e15, 1e12) == "memory"
    with pytest.raises(ValueError, match="positive"):
        speed_of_light(cost, 0, 1)


def test_attention_cost_counts_visible_pairs() -> None:
    q = torch.empty(1, 4, 2, 8)
    assert attention.cost(q, q, q).flops == 4 * 2 * 8 * (1 + 2 + 3 + 4)
    assert attention.cost(q, q, q, window=2).flops == 4 * 2 * 8 * (1 + 2 + 2 + 2)
