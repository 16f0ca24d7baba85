"""The GPT: rotary positions, QK-norm, grouped queries, ReLU^2 MLP, RMSNorm without weights,
untied head, softcapped logits. Every operation goes through its `Op`.

A token's way, for d12 (C 768, H 6, Hkv 6, D 128, V 65536) with B 8 and T 2048:

    ids (8, 2048) -> wte, norm -> x (8, 2048, 768)
    12 blocks: c_qkv -> (8, 2048, 2304) -> q, k, v (8, 2048, 6, 128) -> attention -> c_proj;
               c_fc -> (8, 2048, 3072), ReLU^2 -> c_proj; both added to x
    norm -> lm_head -> logits (8, 2048, 65536), 4 GiB in float32, which the fused loss never holds
    as a whole (kernels/linear_cross_entropy.py)

Letters  B batch, T tokens, S cached positions, H query heads, Hkv key/value heads, D head width,
         C model width, V vocabulary, E = (H + 2 Hkv) D.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import scaling
from nanochat.kernels.attention import attention
from nanochat.kernels.linear_cross_entropy import linear_cross_entropy, softcapped_logits
from nanochat.kernels.norm_rope import rotary_tables
from nanochat.kernels.qk_norm_rope import qk_norm_rope
from nanochat.kernels.relu2_mlp import relu2_mlp
from nanochat.kernels.rms_norm import add_rms_norm, rms_norm
from nanochat.optim.adamw import AdamW, DistAdamW
from nanochat.optim.muon import DistMuon, Muon
from nanochat.optim.sharding import BucketOptimizer

SOFTCAP = 15.0
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model.

    Raises  ValueError for sizes no model can have.
    """

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GPTConfig.{name} = {value!r} must be a positive integer")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of 2 * n_head = {2 * self.n_head}"
            )
        scaling.num_kv_heads(self.n_head, self.n_kv_head)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value matrices in the packed projection."""
        kv_rows = self.n_kv_head * self.head_dim
        return self.n_head * self.head_dim, kv_rows, kv_rows


class KVCache:
    """Keys and values of each layer for a batch of slots, each with its own length.

    keys, values  (n_layer, B, S, Hkv, D); lengths (B,) int64, the valid positions of each slot.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.n_layer, batch_size, capacity, config.n_kv_head, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def view(self, batch_size: int, capacity: int) -> "KVCache":
        """The first slots and positions, in the same memory."""
        part = copy.copy(self)
        part.keys = self.keys[:, :batch_size, :capacity]
        part.values = self.values[:, :batch_size, :capacity]
        part.lengths = self.lengths[:batch_size]
        return part

    def fill(self, slots: list[int], source: "KVCache", row: int, length: int) -> None:
        """Put the first `length` positions of a row of another cache into slots of this one."""
        self.keys[:, slots, :length] = source.keys[:, row : row + 1, :length]
        self.values[:, slots, :length] = source.values[:, row : row + 1, :length]
        self.lengths[slots] = length

    def append(self, layer: int, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tokens after each slot's length; returns the layer's whole keys and values."""
        B, T = k_BTHD.shape[:2]
        rows = torch.arange(B, device=self.lengths.device)[:, None]
        positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        self.keys[layer].index_put_((rows, positions), k_BTHD)
        self.values[layer].index_put_((rows, positions), v_BTHD)
        return self.keys[layer], self.values[layer]


class Linear(nn.Linear):
    """A matrix product without bias, in the dtype of its input; the parameter stays float32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class CausalSelfAttention(nn.Module):
    """Packed QKV projection, rotary and norm, attention, output projection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.c_qkv = Linear(config.n_embd, sum(config.qkv_rows))
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        # one product for q, k and v: (B, T, E); the operation reads the three parts in place
        n_head, n_kv_head = self.config.n_head, self.config.n_kv_head
        offsets = None if cache is None else cache.lengths
        q, k, v = qk_norm_rope(self.c_qkv(x_BTC), cos, sin, n_head, n_kv_head, offsets)
        if cache is None:
            y = attention(q, k, v)
        else:
            # the queries are the last T positions of each slot; what lies after its length is left
            # over from another request and masked
            keys, values = cache.append(self.layer, k, v)
            y = attention(q, keys, values, None, cache.lengths + x_BTC.shape[1])
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """C -> 4 C -> C with ReLU^2 between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        # both weights go into one operation, so that it may fuse the activation with the products
        w_up, w_down = (w.to(x_BTC.dtype) for w in (self.c_fc.weight, self.c_proj.weight))
        return relu2_mlp(x_BTC, w_up, w_down)


class Block(nn.Module):
    """(residual, its norm) -> the same after attention and MLP; additions are fused with norms."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        # x is the residual stream, y its norm: what the next layer reads
        x, y = add_rms_norm(x, self.attn(y, cos, sin, cache))
        return add_rms_norm(x, self.mlp(y))


class GPT(nn.Module):
    """The model: build it on the meta device, `to_empty` it where it shall live, `init_weights`.

    dtype  of activations and matrix products; parameters are float32.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        vocab = scaling.padded_vocab_size(config.vocab_size)
        self.wte = nn.Embedding(vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, vocab)
        cos, sin = rotary_tables(config.sequence_len, config.head_dim, ROPE_BASE, "cpu")
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Embedding N(0, 1); matrices N(0, 1/fan_in), narrower where fan_out < fan_in; head and
        output projections zero, so that the untrained model predicts every token equally.

        The same seed gives the same model on every device: numbers are drawn on the CPU.
        """
        generator = torch.Generator().manual_seed(seed)

        def fill(weight: Tensor, std: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

        fill(self.wte.weight, 1.0)
        for block in self.blocks:
            assert isinstance(block, Block)
            for weight in (
                *block.attn.c_qkv.weight.split(self.config.qkv_rows),
                block.mlp.c_fc.weight,
            ):
                fan_out, fan_in = weight.shape
                fill(weight, fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        self.lm_head.weight.zero_()
        config = self.config
        tables = rotary_tables(config.sequence_len, config.head_dim, ROPE_BASE, self.device)
        self.cos, self.sin = tables

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final normalised states (B, T, C) of token ids (B, T).

        Raises  ValueError if the tokens do not fit the context or the cache.
        """
        T = idx_BT.shape[1]
        limit = self.config.sequence_len if cache is None else cache.capacity
        if limit < T:
            raise ValueError(f"{T} tokens do not fit the {limit} positions; shorten the input")
        # the embedding is normalised itself, then once more as the first block expects
        x = rms_norm(self.wte(idx_BT).to(self.dtype))
        y = rms_norm(x)
        for block in self.blocks:
            x, y = block(x, y, self.cos, self.sin, cache)
        # only now: every layer appended at the same positions
        if cache is not None:
            cache.lengths += T
        return y

    def head(self, y: Tensor) -> Tensor:
        """Softcapped float32 logits (..., V) of final states (..., C)."""
        weight = self.lm_head.weight.to(y.dtype)
        return softcapped_logits(y, weight, SOFTCAP, self.config.vocab_size)

    def forward(
        self,
        idx_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Loss where targets are given (ids, -1 = none), otherwise float32 logits (B, T, V)."""
        y = self.hidden(idx_BT, cache)
        if targets_BT is None:
            return self.head(y)
        weight, vocab_size = self.lm_head.weight.to(y.dtype), self.config.vocab_size
        return linear_cross_entropy(y, weight, targets_BT, SOFTCAP, vocab_size, loss_reduction)

    @torch.inference_mode()
    def generate(
        self,
        tokens: list[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:
        """Sampled ids one by one: the plain definition, which recomputes the whole context.

        temperature  0 takes the likeliest token.
        top_k        sample among the k likeliest; None or 0 is all.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        ids = torch.tensor([tokens], device=self.device)
        for _ in range(max_tokens):
            logits = self(ids[:, -self.config.sequence_len :])[:, -1]
            if top_k:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            if temperature == 0:
                next_id = logits.argmax(dim=-1, keepdim=True)
            else:
                weights = (logits / temperature).softmax(dim=-1)
                next_id = torch.multinomial(weights, 1, generator=generator)
            ids = torch.cat((ids, next_id), dim=1)
            yield int(next_id)

    def num_parameters(self) -> scaling.ParameterCount:
        """Parameters by role, padding included."""
        c = self.config
        return scaling.count_parameters(c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.vocab_size)

    def estimate_flops(self, causal: bool = False) -> int:
        """Training FLOPs of a token; causal as in scaling.flops_per_token."""
        c = self.config
        return scaling.flops_per_token(
            self.num_parameters(), c.n_layer, c.n_embd, c.sequence_len, causal
        )

    def setup_optimizers(
        self,
        embedding_lr: float,
        unembedding_lr: float,
        matrix_lr: float,
        weight_decay: float,
        distributed: bool,
        newton_schulz: str = "muon",
    ) -> list[BucketOptimizer]:
        """AdamW for embedding and head (rates scaled by width), Muon for the blocks' matrices.

        newton_schulz  coefficients of Muon: "muon" or "polar_express".
        """
        # rates were tuned at width 768 and fall with 1 / sqrt(width); Muon's does not depend on it
        scale = scaling.adamw_rate_scale(self.config.n_embd)
        adamw_groups = [
            {"params": [self.wte.weight], "lr": embedding_lr * scale},
            {"params": [self.lm_head.weight], "lr": unembedding_lr * scale},
        ]
        # which matrices pack several maps, Muon has to know
        packed = [p for name, p in self.blocks.named_parameters() if "c_qkv" in name]
        single = [p for name, p in self.blocks.named_parameters() if "c_qkv" not in name]
        muon_groups = [
            {"params": packed, "row_splits": self.config.qkv_rows},
            {"params": single},
        ]
        adamw_type, muon_type = (DistAdamW, DistMuon) if distributed else (AdamW, Muon)
        adamw = adamw_type(
            adamw_groups, lr=embedding_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay
        )
        return [adamw, muon_type(muon_groups, lr=matrix_lr, coefficients=newton_schulz)]
