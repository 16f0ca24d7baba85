"""What each operation keeps for the backward pass, in bytes, by arithmetic.

A `Setup` says which model is trained how; `activations` sums what its kernels keep. One unit is
tokens x width x bytes of the compute dtype: a layer of kernels in Triton keeps 14 of them, by
reference 20 and the score matrices. `memory` counts the same in a real step; tests compare the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from nanochat import scaling

Bytes = dict[str, int]
FLOAT32 = 4  # bytes: of parameters, gradients, moments and statistics


class ModelSizes(Protocol):
    """A GPTConfig, or anything with its sizes."""

    @property
    def sequence_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_kv_head(self) -> int: ...
    @property
    def n_embd(self) -> int: ...


@dataclass(frozen=True)
class Setup:
    """A model and how a step of it is run.

    kernels        operation -> implementation
    micro_batches  of one step on each device
    itemsize       bytes of the compute dtype
    architecture   of the GPU whose kernel configurations count
    """

    model: ModelSizes
    device_batch_size: int
    kernels: Mapping[str, str]
    micro_batches: int = 2
    world_size: int = 1
    itemsize: int = 2
    architecture: str = "sm_90"

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one device."""
        return self.device_batch_size * self.model.sequence_len

    @property
    def unit(self) -> int:
        """Bytes of one activation of the model's width."""
        return self.tokens * self.model.n_embd * self.itemsize

    @property
    def heads(self) -> int:
        """Bytes of one query head of every token."""
        return self.unit // self.model.n_head

    @property
    def vocab(self) -> int:
        """Rows of embedding and head, padding included."""
        return scaling.padded_vocab_size(self.model.vocab_size)

    @property
    def head_numel(self) -> int:
        """Elements of the embedding, or of the head."""
        return self.vocab * self.model.n_embd

    @property
    def score_numel(self) -> int:
        """Pairs of positions that attention by reference looks at in one layer."""
        return self.device_batch_size * self.model.n_head * self.model.sequence_len**2

    def by_reference(self, op: str) -> bool:
        """Whether an operation runs in plain PyTorch."""
        return self.kernels.get(op, "reference") == "reference"

    @property
    def parameters(self) -> scaling.ParameterCount:
        """Of the model."""
        m = self.model
        return scaling.count_parameters(m.n_layer, m.n_embd, m.n_head, m.n_kv_head, m.vocab_size)


def _statistics(s: Setup, rows_per_token: int) -> int:
    return FLOAT32 * s.tokens * rows_per_token


def _attention_by_reference(s: Setup) -> int:
    # the weights in float32 as softmax returns them and rounded for the product; copies of q, k and
    # v, whose groups are written out; the mask; the output once more, in the order of the tokens
    rounded = 0 if s.itemsize == FLOAT32 else s.itemsize
    return s.score_numel * (FLOAT32 + rounded) + 4 * s.unit + s.model.sequence_len**2


def _fused_attention(s: Setup) -> int:
    # q, k and y, and the sum of each row; v is a view of the packed projection
    heads = 2 * s.model.n_head + s.model.n_kv_head
    return heads * s.heads + _statistics(s, s.model.n_head)


def _attention_varlen(s: Setup) -> int:
    # keys and values of groups are written out for every query head
    grouped = s.model.n_head if s.model.n_head > s.model.n_kv_head else 0
    return _fused_attention(s) + 2 * grouped * s.heads


def _rope_by_reference(s: Setup) -> int:
    # the rotated heads in float32, the statistics of their norms, the rows of both tables
    heads, m = s.model.n_head + s.model.n_kv_head, s.model
    head_dim = m.n_embd // m.n_head
    rotated = FLOAT32 * s.tokens * heads * head_dim
    return rotated + _statistics(s, heads) + FLOAT32 * m.sequence_len * head_dim


def _packed(s: Setup) -> int:
    return (s.model.n_head + 2 * s.model.n_kv_head) * s.heads


def _loss_by_reference(s: Setup) -> int:
    # the states; tanh and log-softmax of every logit in float32
    return s.unit + 2 * FLOAT32 * s.tokens * s.model.vocab_size


def _layers(count: Callable[[Setup], int]) -> Callable[[Setup], int]:
    return lambda s: s.model.n_layer * count(s)


FUSED_MLP = _layers(lambda s: 5 * s.unit)  # its input and post

# operation -> implementation -> bytes that all its calls keep for the backward pass, as its
# docstring says. A tensor that two operations keep is counted at the first.
SAVES: dict[str, dict[str, Callable[[Setup], int]]] = {
    "rms_norm": {
        "reference": lambda s: 2 * (s.unit + _statistics(s, 1)),
        "triton": lambda s: 2 * s.unit,
    },
    "add_rms_norm": {
        "reference": _layers(lambda s: 2 * (s.unit + _statistics(s, 1))),
        "triton": _layers(lambda s: 2 * s.unit),
    },
    "qk_norm_rope": {
        "reference": _layers(_rope_by_reference),
        "triton": _layers(_packed),
    },
    "attention": {
        "reference": _layers(_attention_by_reference),
        "varlen": _layers(_attention_varlen),
        **dict.fromkeys(("sdpa", "flex", "fa2", "fa3", "fa4"), _layers(_fused_attention)),
    },
    "relu2_mlp": {
        "reference": _layers(lambda s: 9 * s.unit),  # its input, relu and its square
        **dict.fromkeys(("triton_pointwise", "triton_tma", "triton"), FUSED_MLP),
    },
    "linear_cross_entropy": {
        "reference": _loss_by_reference,
        "triton_min_memory": lambda s: s.unit,
        "triton": lambda s: s.unit + FLOAT32 * s.head_numel,  # dx and dW
    },
}


def activations(s: Setup) -> Bytes:
    """Bytes by operation when the forward pass ends, the loss included.

    Raises  ValueError for an implementation that nothing is known about.
    """
    totals = {"c_qkv": s.model.n_layer * s.unit}
    for op, implementations in SAVES.items():
        name = s.kernels.get(op, "reference")
        if name not in implementations:
            raise ValueError(
                f"what {op}={name} keeps for the backward pass is not known; plan with one of "
                f"{', '.join(implementations)}"
            )
        totals[op] = implementations[name](s)
    # v is a view of the packed projection: attention keeps that alive where the rotation does not
    if not s.by_reference("attention") and s.by_reference("qk_norm_rope"):
        totals["attention"] += s.model.n_layer * _packed(s)
    return totals
