"""The memory of a training step by arithmetic: the same categories as `memory` counts, in no time.

Weights, gradients and optimizer state are exact, sharded or not; activations are those of
`activations`. The peak is the largest of a few moments, any of which may be it:

    loss          every activation, the gradients of earlier micro-batches, a chunk of logits
    MLP backward  the same without the loss, and the gradients inside the last block's network
    attention     by reference: the score matrices of one layer in float32
    embedding     every gradient, and the embedding's once more
    reduction     every gradient, and the stacks that Muon packs
    AdamW, Muon   the optimizer on its largest bucket

Of several ranks the last three are upper bounds: a backend may let go of a packed stack before its
collective has ended.

Example, d20 with 8 x 2048 tokens in bfloat16, kernels in Triton: 2.25 GB of weights, 2.24 of
gradients and 2.92 of optimizer state; 11.8 of activations, of which 14 units of tokens x width x 2
bytes belong to each of 20 layers; 0.95 of weights in bfloat16; 1.37 for a chunk of 7552 rows of
logits beside dx and dW. The peak is in the loss: 21.6 GB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from nanochat.kernels.launch import recording
from nanochat.kernels.linear_cross_entropy_chunks import chunk_rows, extra_bytes
from nanochat.profiler.activations import FLOAT32, Bytes, ModelSizes, Setup, activations
from nanochat.profiler.memory import (
    ACTIVATIONS,
    COPIES,
    GRADIENTS,
    OPTIMIZER,
    TEMPORARIES,
    WEIGHTS,
    WORKSPACE,
)


@dataclass(frozen=True)
class Footprint:
    """What one step needs, in bytes.

    steady       by category, between two steps
    peak         by category, at the moment that needs most
    peak_moment  its name
    activations  by operation, when all are alive
    """

    steady: Bytes
    peak: Bytes
    peak_moment: str
    activations: Bytes

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


@dataclass(frozen=True)
class Bucket:
    """A stack of matrices that Muon steps at once: `count` of `rows` x `columns`.

    single  one parameter whole, which one rank need not copy to pack
    """

    count: int
    rows: int
    columns: int
    single: bool

    def numel(self, world_size: int = 1) -> int:
        """Elements that a rank owns: whole matrices, some of which may be padding."""
        return ceil(self.count / world_size) * self.rows * self.columns


def buckets(m: ModelSizes) -> list[Bucket]:
    """Muon's, in the order in which they are stepped: those of the packed projections first."""
    L, C = m.n_layer, m.n_embd
    kv_rows = C // m.n_head * m.n_kv_head
    if kv_rows == C:
        packed = [Bucket(3 * L, C, C, False)]
    else:
        packed = [Bucket(L, C, C, False), Bucket(2 * L, kv_rows, C, False)]
    one = L == 1
    return [*packed, Bucket(L, C, C, one), Bucket(L, 4 * C, C, one), Bucket(L, C, 4 * C, one)]


def optimizer_bytes(s: Setup) -> int:
    """State that one rank keeps: two moments of embedding and head, one of every matrix."""
    moments = 2 * 2 * ceil(s.head_numel / s.world_size)
    return FLOAT32 * (moments + sum(bucket.numel(s.world_size) for bucket in buckets(s.model)))


Moment = tuple[str, Bytes]


def moments(s: Setup) -> list[Moment]:
    """(name, bytes by category beyond weights and optimizer state) of each candidate for the peak.

    Gradients are counted where they exist: before the first backward pass of a step there are none.
    """
    return [*_forward_and_backward(s), *_reduction_and_step(s)]


def _forward_and_backward(s: Setup) -> Iterator[Moment]:
    gradients = FLOAT32 * s.parameters.total
    saved = activations(s)
    layers = sum(saved.values()) - saved["linear_cross_entropy"]
    low_precision = s.itemsize < FLOAT32
    copies = s.itemsize * s.parameters.matrices if low_precision else 0
    head_copy = s.itemsize * s.head_numel if low_precision else 0
    beside = {GRADIENTS: gradients if s.micro_batches > 1 else 0, COPIES: copies}

    # the loss, which the forward pass of the fused kernel already differentiates
    loss = {**beside, COPIES: copies + head_copy}
    if s.by_reference("linear_cross_entropy"):
        logits = 2 * FLOAT32 * s.tokens * s.model.vocab_size
        kept = layers + saved["linear_cross_entropy"]
        yield "loss", loss | {ACTIVATIONS: kept, TEMPORARIES: logits}
    else:
        chunk = _loss_workspace(s)
        yield "loss", loss | {ACTIVATIONS: layers, TEMPORARIES: s.unit, WORKSPACE: chunk}

    # the network of the last block: the gradients of post, of pre and what leads from one to the
    # other; by reference the second product is done with by then, and with it what it kept
    done, inside = (5, 17) if s.by_reference("relu2_mlp") else (1, 6)
    kept = layers - done * s.unit
    yield "MLP backward", beside | {ACTIVATIONS: kept, TEMPORARIES: inside * s.unit}
    if s.by_reference("attention"):
        # softmax of the last layer: scores, masked scores and weights in float32
        rounded = s.itemsize if low_precision else 0
        network = 12 if s.by_reference("relu2_mlp") else 8
        to_come = s.score_numel * (FLOAT32 + rounded) + network * s.unit
        scores = 3 * FLOAT32 * s.score_numel + 6 * s.unit
        yield "attention", beside | {ACTIVATIONS: layers - to_come, TEMPORARIES: scores}
    # the embedding's output is float32, and so is its gradient; that of the weight is dense, and
    # added to the one there is from earlier micro-batches
    again = s.head_numel if s.micro_batches > 1 else 0
    dense = FLOAT32 * (again + s.tokens * s.model.n_embd)
    yield "embedding", {GRADIENTS: gradients, TEMPORARIES: dense}


def loss_rows(s: Setup) -> int:
    """Rows whose logits the loss in Triton has in memory at once."""
    small = s.kernels["linear_cross_entropy"] == "triton_min_memory"
    dtype = torch.float32 if s.itemsize == FLOAT32 else torch.bfloat16
    with recording(s.architecture):
        like = torch.empty(s.tokens, s.model.n_embd, dtype=dtype, device="meta")
        return min(chunk_rows(like, s.vocab, small), s.tokens)


def _loss_workspace(s: Setup) -> int:
    """Bytes that the loss in Triton takes beside its inputs."""
    again = s.kernels["linear_cross_entropy"] == "triton_min_memory"
    return extra_bytes(s.tokens, s.model.n_embd, s.vocab, loss_rows(s), s.itemsize, again)


def _reduction_and_step(s: Setup) -> Iterator[Moment]:
    ranks, stacks = s.world_size, buckets(s.model)
    gradients = FLOAT32 * s.parameters.total
    # each bucket packed, and the share of it that this rank owns; one rank owns what it packed
    packed = [0 if b.single and ranks == 1 else FLOAT32 * b.numel(ranks) * ranks for b in stacks]
    owned = [size // ranks for size in packed]
    head = FLOAT32 * ceil(s.head_numel / ranks)
    heads_owned, sent = (2 * head, sum(packed)) if ranks > 1 else (0, 0)
    reduced = heads_owned + sum(owned)
    yield "reduction", {GRADIENTS: gradients, TEMPORARIES: reduced + sent}
    # AdamW: the root of the second moment; the gathered weights stay until all are in place
    root = head if s.by_reference("adamw_step") else 0
    gathered = 2 * head * ranks + head if ranks > 1 else 0
    yield "AdamW", {GRADIENTS: gradients, TEMPORARIES: reduced + root + gathered}
    for i, bucket in enumerate(stacks):
        # the weight; the look-ahead and the result in float32, X, X X^T and its polynomial
        numel = bucket.numel(ranks)
        short, long = sorted((bucket.rows, bucket.columns))
        stepping = owned[i] + numel * (4 + 4 + 2) + numel * 2 * 2 * short // long
        gathered = sum(packed[: i + 1]) if ranks > 1 else 0
        yield "Muon", {GRADIENTS: gradients, TEMPORARIES: sum(owned[i:]) + stepping + gathered}


def footprint(s: Setup) -> Footprint:
    """The memory of a step, by category, steady and at the peak."""
    tables = FLOAT32 * s.model.sequence_len * (s.model.n_embd // s.model.n_head)
    steady = {WEIGHTS: FLOAT32 * s.parameters.total + tables, OPTIMIZER: optimizer_bytes(s)}
    name, beyond = max(moments(s), key=lambda moment: sum(moment[1].values()))
    return Footprint(steady, steady | beyond, name, activations(s))
