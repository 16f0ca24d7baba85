"""A model on Triton kernels trains like one on the references."""

from collections.abc import Iterator

import pytest
import torch

from nanochat.common import Runtime, setup_training
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.registry import REGISTRY, select
from nanochat.train.step import set_rates, train_step

pytestmark = pytest.mark.long

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 24


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    for op in REGISTRY.values():
        op.use("reference")


def build(layers: int, width: int, dtype: torch.dtype = torch.float32) -> GPT:
    """A model whose zero matrices are not zero, so that every gradient flows."""
    config = GPTConfig(TOKENS, 300, layers, width // 64, 1, width)
    model = GPT(config, dtype).to(HERE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(HERE))
    return model.to(dtype) if dtype == torch.float64 else model


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step % 4)
    ids = torch.randint(300, (2, TOKENS + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :3] = -1
    return ids[:, :-1].to(HERE), targets.to(HERE)


def gradients(model: GPT, spec: str) -> dict[str, torch.Tensor]:
    chosen = select(spec, HERE, torch.float32)
    if spec == "triton":
        assert chosen
    loss = model(*batch())
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **found}


def test_one_step_of_d4_on_all_kernels() -> None:
    want = gradients(build(4, 256, torch.float64), "reference")
    eager = gradients(build(4, 256), "reference")
    got = gradients(build(4, 256), "triton")
    assert got.keys() == want.keys()
    for name, w in want.items():
        allowed = 2 * (eager[name] - w).norm() + 1e-6 * max(1.0, w.norm().item())
        assert (got[name] - w).norm() <= allowed, name


def losses(runtime: Runtime, spec: str, steps: int) -> list[float]:
    select(spec, HERE, torch.float32)
    model = build(1, 64)
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
    found = []
    for step in range(steps):
        set_rates(optimizers, 1.0, 0.9)
        found.append(train_step(model, optimizers, [batch(step)], runtime).loss.item())
    return found


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_steps_have_one_loss_curve(steps: int) -> None:
    runtime = setup_training(HERE.type)
    want, got = losses(runtime, "reference", steps), losses(runtime, "triton", steps)
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for w, g in zip(want, got, strict=True):
        assert abs(w - g) < 0.02 * want[0]
    assert got[-1] < 0.9 * got[0]


def test_whole_model_traces_without_a_graph_break() -> None:
    select("triton", HERE, torch.float32)
    model = build(2, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    want, got = model(*batch()), compiled(*batch())
    assert torch.equal(want, got)
    got.backward()
    assert all(p.grad is not None for p in model.parameters())
