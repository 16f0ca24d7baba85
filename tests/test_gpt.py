"""The model against a second, plain implementation, its sizes, its cache and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import setup_training
from nanochat.eval.loss import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig, KVCache

SMALL = GPTConfig(sequence_len=32, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def build(config: GPTConfig = SMALL, randomise: bool = True) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights(1)
    if randomise:  # zero projections would hide whatever stands before them
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def plain_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The architecture written out with loops over heads and positions, in float64."""
    c = model.config
    weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotate(x: torch.Tensor, t: int) -> torch.Tensor:
        half = c.head_dim // 2
        y = torch.empty_like(x)
        for i in range(half):
            angle = torch.tensor(t * 10_000.0 ** (-2 * i / c.head_dim), dtype=torch.float64)
            y[i] = x[i] * angle.cos() + x[i + half] * angle.sin()
            y[i + half] = -x[i] * angle.sin() + x[i + half] * angle.cos()
        return norm(y)

    x = norm(weights["wte.weight"][idx])
    for layer in range(c.n_layer):
        qkv = norm(x) @ weights[f"blocks.{layer}.attn.c_qkv.weight"].T
        q, k, v = qkv.split(c.qkv_rows, dim=-1)
        heads = []
        for h in range(c.n_head):
            kv = h // (c.n_head // c.n_kv_head)
            cut, kv_cut = (slice(i * c.head_dim, (i + 1) * c.head_dim) for i in (h, kv))
            qs = [rotate(q[t, cut], t) for t in range(len(idx))]
            ks = [rotate(k[t, kv_cut], t) for t in range(len(idx))]
            rows = []
            for t in range(len(idx)):
                scores = torch.stack([qs[t] @ ks[s] for s in range(t + 1)]) / c.head_dim**0.5
                rows.append(scores.softmax(0) @ v[: t + 1, kv_cut])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, dim=-1) @ weights[f"blocks.{layer}.attn.c_proj.weight"].T
        hidden = F.relu(norm(x) @ weights[f"blocks.{layer}.mlp.c_fc.weight"].T) ** 2
        x = x + hidden @ weights[f"blocks.{layer}.mlp.c_proj.weight"].T
    logits = norm(x) @ weights["lm_head.weight"].T
    return 15 * torch.tanh(logits[:, : c.vocab_size] / 15)


def test_logits_equal_the_plain_model() -> None:
    model = build()
    idx = torch.randint(101, (9,), generator=torch.Generator().manual_seed(0))
    got = model(idx[None])[0].double()
    assert torch.allclose(got, plain_logits(model, idx), atol=2e-5)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = build()
    idx = torch.randint(101, (2, 8))
    targets = torch.randint(101, (2, 8))
    targets[0, :3] = -1
    want = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert torch.allclose(model(idx, targets), want, atol=1e-6)
    each = model(idx, targets, loss_reduction="none")
    assert each.shape == (2, 8)
    assert torch.allclose(each.sum() / 13, want, atol=1e-6)


def test_untrained_model_predicts_every_token_equally() -> None:
    model = build(randomise=False)
    idx = torch.randint(101, (1, 8))
    assert model(idx, idx).item() == pytest.approx(torch.tensor(101.0).log().item(), abs=1e-5)


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 3, 1)])
def test_cache_gives_the_logits_of_the_whole(chunks: tuple[int, ...]) -> None:
    model = build()
    idx = torch.randint(101, (2, 9))
    want = model(idx)
    cache = KVCache(SMALL, 2, 12, "cpu", torch.float32)
    got = torch.cat([model(part, cache=cache) for part in idx.split(chunks, dim=1)], dim=1)
    assert torch.allclose(got, want, atol=1e-5)
    assert cache.lengths.tolist() == [9, 9]


def test_cache_slots_have_lengths_of_their_own() -> None:
    model = build()
    long, short = torch.randint(101, (1, 7)), torch.randint(101, (1, 3))
    cache = KVCache(SMALL, 2, 12, "cpu", torch.float32)
    for slot, prompt in enumerate((long, short)):
        alone = KVCache(SMALL, 1, 12, "cpu", torch.float32)
        model(prompt, cache=alone)
        cache.keys[:, slot], cache.values[:, slot] = alone.keys[:, 0], alone.values[:, 0]
        cache.lengths[slot] = alone.lengths[0]
    step = torch.randint(101, (2, 1))
    got = model(step, cache=cache)
    for slot, prompt in enumerate((long, short)):
        want = model(torch.cat((prompt, step[slot : slot + 1]), dim=1))[:, -1]
        assert torch.allclose(got[slot], want, atol=1e-5)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens do not fit the 32"):
        build()(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    "sizes", [{"n_layer": 0}, {"n_embd": 63}, {"n_kv_head": 4, "n_head": 6}, {"vocab_size": -1}]
)
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|does not divide"):
        GPTConfig(**sizes)


def test_counted_parameters_are_the_parameters() -> None:
    model = build()
    counted = model.num_parameters()
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.embedding == model.wte.weight.numel() == 128 * 64
    assert counted.matrices == sum(p.numel() for p in model.blocks.parameters())


def test_every_parameter_gets_a_gradient() -> None:
    model = build()
    idx = torch.randint(101, (2, 8))
    model(idx, idx).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_every_parameter_is_optimised_once() -> None:
    model = build()
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


def test_initialisation_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(5)
    first = build(randomise=False).state_dict()
    torch.manual_seed(6)
    second = build(randomise=False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    query = first["blocks.0.attn.c_qkv.weight"][:64]
    assert query.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_greedy_generation_takes_the_likeliest() -> None:
    model = build()
    ids = [3, 5]
    for token in model.generate([3, 5], 5, temperature=0):
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)
    assert list(model.generate([3], 4, seed=1)) == list(model.generate([3], 4, seed=1))
    top1 = list(model.generate([3], 4, temperature=2.0, top_k=1))
    assert top1 == list(model.generate([3], 4, temperature=0))
    assert len(list(model.generate([3], 2, top_k=0))) == 2


@pytest.mark.long
def test_model_traces_without_a_graph_break() -> None:
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    idx = torch.randint(101, (2, 8))
    assert torch.allclose(compiled(idx, idx), model(idx, idx))


class TestBitsPerByte:
    def test_counts_bytes_and_skips_special_and_ignored(self) -> None:
        model = build(randomise=False)
        runtime = setup_training("cpu")
        token_bytes = torch.ones(101, dtype=torch.int32) * 2
        token_bytes[7] = 0
        targets = torch.tensor([[1, 7, -1, 2]])
        bpb = evaluate_bpb(model, [(torch.zeros_like(targets), targets)], token_bytes, runtime)
        # two targets of two bytes each, at log2(101) bits
        assert bpb == pytest.approx(torch.tensor(101.0).log2().item() / 2, rel=1e-5)

    def test_no_bytes_is_infinite(self) -> None:
        model = build()
        targets = torch.full((1, 4), -1)
        zeros = torch.zeros(101, dtype=torch.int32)
        batches = [(torch.zeros_like(targets), targets)]
        assert evaluate_bpb(model, batches, zeros, setup_training("cpu")) == float("inf")
