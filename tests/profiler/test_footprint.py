"""Memory by arithmetic against real models: PyTorch's own counts on the meta device."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat.gpt import GPT
from nanochat.kernels.registry import operations
from nanochat.profiler.activations import SAVES, Setup, activations
from nanochat.profiler.footprint import footprint, optimizer_bytes
from nanochat.train.rehearsal import count_memory
from nanochat.train.run import model_config

REFERENCE = dict.fromkeys(operations(), "reference")
FUSED = REFERENCE | {
    "attention": "sdpa", "linear_cross_entropy": "triton", "rms_norm": "triton",
    "add_rms_norm": "triton", "qk_norm_rope": "triton", "relu2_mlp": "triton_pointwise",
    "adamw_step": "triton", "newton_schulz": "triton",
}  # fmt: skip
GQA = 1


@pytest.mark.parametrize("n_kv_head", [-1, GQA])
@pytest.mark.parametrize("depth", range(4, 21, 4))
def test_weights_and_optimizer_are_those_of_the_model(depth: int, n_kv_head: int) -> None:
    config = model_config(depth, n_kv_head, 2048, 65_536)
    with torch.device("meta"):
        model = GPT(config)
    foreseen = footprint(Setup(config, 1, FUSED))
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert foreseen.steady["weights"] == weights
    gradients = [moment for moment in foreseen.peak.items() if moment[0] == "gradients"]
    assert gradients == [("gradients", sum(p.nbytes for p in model.parameters()))]
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
    assert foreseen.steady["optimizer"] == state_bytes(optimizers)


def state_bytes(optimizers: list) -> int:
    return sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many ranks that sends nothing; this is rank 0."""
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fake.*")
@pytest.mark.parametrize("ranks", [2, 3, 8], indirect=True)
@pytest.mark.parametrize("n_kv_head", [-1, GQA])
def test_a_rank_keeps_its_share_of_the_optimizer(ranks: int, n_kv_head: int) -> None:
    """3 ranks: stacks and embeddings that do not divide are padded."""
    for depth in (4, 11):
        config = model_config(depth, n_kv_head, 64, 1000)
        with torch.device("meta"):
            model = GPT(config)
        optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=True)
        foreseen = optimizer_bytes(Setup(config, 1, FUSED, world_size=ranks))
        assert foreseen == state_bytes(optimizers)


# depth, key/value heads, batch, sequence, vocabulary, micro-batches: the peak in the loss, in the
# network of the last block, in attention by reference, and in the optimizer
SHAPES = (
    (4, -1, 4, 256, 8192, 2),
    (6, GQA, 8, 1024, 8192, 1),
    (2, -1, 4, 2048, 128, 2),
    (4, -1, 1, 64, 65_536, 1),
    (6, -1, 1, 64, 8192, 2),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kernels",
    [REFERENCE, REFERENCE | {"attention": "sdpa"}, FUSED],
    ids=["reference", "reference with sdpa", "fused"],
)
def test_activations_and_peak_are_within_five_percent(kernels, shape, dtype) -> None:
    depth, n_kv_head, batch, length, vocab, micro_batches = shape
    config = model_config(depth, n_kv_head, length, vocab)
    counted = count_memory(config, batch, kernels, dtype, micro_batches)
    foreseen = footprint(Setup(config, batch, kernels, micro_batches, itemsize=dtype.itemsize))
    assert counted.steady == dict.fromkeys(counted.steady, 0) | foreseen.steady
    assert foreseen.total == pytest.approx(sum(counted.peak.values()), rel=0.01)
    by_operation = counted.by_operation()
    assert sum(foreseen.activations.values()) == pytest.approx(sum(by_operation.values()), rel=0.05)
    # by operation too; one row keeps fewer copies, because a transposed head of it is a view
    for name, foreseen_bytes in foreseen.activations.items() if batch > 1 and depth > 2 else ():
        by_reference = name == "attention" and kernels[name] == "reference"
        theirs = by_operation[name] + (by_operation["c_proj"] if by_reference else 0)
        assert foreseen_bytes == pytest.approx(theirs, rel=0.01), name


@pytest.mark.parametrize("op", sorted(SAVES))
def test_each_implementation_saves_what_is_foreseen(op: str) -> None:
    """All others by reference; what needs packages that are not here keeps what sdpa keeps."""
    config = model_config(4, -1, 512, 8192)
    for name in operations()[op].implementations:
        kernels = REFERENCE | {"attention": "sdpa"} | {op: name}
        foreseen = footprint(Setup(config, 2, kernels)).total
        if op == "attention" and name not in ("reference", "sdpa"):
            like_sdpa = footprint(Setup(config, 2, REFERENCE | {"attention": "sdpa"})).total
            assert foreseen == like_sdpa
        else:
            counted = count_memory(config, 2, kernels)
            assert foreseen == pytest.approx(sum(counted.peak.values()), rel=0.01), name


def test_every_operation_of_the_model_is_foreseen() -> None:
    """An operation or implementation that is registered must say here what it keeps."""
    not_differentiated = {"adamw_step", "newton_schulz"}
    within_another = {"norm_rope"}  # the model calls qk_norm_rope
    assert set(SAVES) == set(operations()) - not_differentiated - within_another
    for op, implementations in SAVES.items():
        assert set(implementations) == set(operations()[op].implementations), op


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention=magic keeps .* is not known; plan with one"):
        activations(Setup(model_config(4, -1, 64, 512), 1, FUSED | {"attention": "magic"}))


@given(st.integers(1, 32), st.integers(1, 64), st.sampled_from([256, 2048]), st.integers(1, 16))
def test_more_needs_more(depth: int, batch: int, length: int, ranks: int) -> None:
    setup = Setup(model_config(depth, -1, length, 8192), batch, FUSED, world_size=ranks)
    here = footprint(setup)
    assert 0 < sum(here.steady.values()) < here.total
    assert min(here.peak.values()) >= 0
    assert footprint(replace(setup, device_batch_size=batch + 1)).total >= here.total
    deeper = model_config(depth + 1, -1, length, 8192)
    assert footprint(replace(setup, model=deeper)).total > here.total
    assert optimizer_bytes(setup) * ranks >= optimizer_bytes(replace(setup, world_size=1))
