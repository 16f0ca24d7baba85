"""Collectives over dim 0 of a tensor, and the optimizer base that steps what this rank owns.

A bucket packs pieces of parameters along dim 0. Every rank owns an equal slice of it (the last ones
padded with zeros): gradients are reduce-scattered into the slice, the slice is stepped, the weights
are all-gathered. On one process the slice is the whole bucket and nothing is sent.

Example: a bucket of 12 matrices of 768 x 768 on 8 ranks, piece_shape (1, 768, 768). shard_len is
ceil(12 / 8) = 2, so the packed tensor is (16, 768, 768) with 4 matrices of zeros at the end. Rank 0
steps matrices 0 and 1, rank 5 steps 10 and 11, ranks 6 and 7 step padding; the gathered (16, 768,
768) is cut back to 12 and copied into the parameters.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from nanochat.common import collective


def reduce_scatter_mean(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start averaging `tensor` over all ranks: (this rank's slice of dim 0, wait).

    tensor: contiguous (W * n, ...); the slice (n, ...) is valid once wait() has returned.
    Sums and divides, since gloo has no mean.
    """
    world_size = dist.get_world_size()
    shard = tensor.new_empty((tensor.shape[0] // world_size, *tensor.shape[1:]))
    with collective():
        work = dist.reduce_scatter_tensor(shard, tensor, async_op=True)
    assert work is not None

    def wait() -> None:
        with collective():
            work.wait()
        shard.div_(world_size)

    return shard, wait


def all_gather(shard: Tensor, output: Tensor) -> Callable[[], None]:
    """Start filling `output` (W * n, ...) with every rank's `shard` (n, ...) in order: wait.

    Both contiguous; neither may be touched before wait() returns.
    """
    with collective():
        work = dist.all_gather_into_tensor(output, shard, async_op=True)
    assert work is not None

    def wait() -> None:
        with collective():
            work.wait()

    return wait


@dataclass(frozen=True)
class Piece:
    """Elements start to stop of a flattened parameter."""

    param: Parameter
    start: int
    stop: int


@dataclass
class Bucket:
    """Pieces packed along dim 0, each as `piece_shape`: (-1,) for elements, (1, m, n) for matrices.

    shard_len  length of dim 0 that one rank owns; world_size * shard_len >= the pieces' total.
    state      the optimizer's: float32 tensors (shard_len, ...) and plain numbers.
    gradient   this rank's slice of the averaged gradient; None before it is reduced, or where no
               piece has one.
    absent     pieces without a gradient, to be left as they are.
    """

    group_index: int
    pieces: list[Piece]
    piece_shape: tuple[int, ...]
    world_size: int
    state: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None
    absent: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # rounded up, so that every rank owns equally much: collectives send equal slices
        self.lengths = [self.view(p, p.param).shape[0] for p in self.pieces]
        self.shard_len = -(-sum(self.lengths) // self.world_size)
        self.padding = self.shard_len * self.world_size - sum(self.lengths)

    def new_state(self) -> Tensor:
        """Float32 zeros in the shape of what one rank owns."""
        shape = (self.shard_len, *self.piece_shape[1:])
        return torch.zeros(shape, dtype=torch.float32, device=self.pieces[0].param.device)

    def view(self, piece: Piece, tensor: Tensor) -> Tensor:
        """The piece of `tensor`, which is its parameter or shaped like it."""
        return tensor.detach().reshape(-1)[piece.start : piece.stop].view(self.piece_shape)

    def pack(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One tensor (world_size * shard_len, ...) of each piece's tensor, None as zeros.

        A single piece that needs no padding is returned as a view.
        """
        views = [
            self.view(piece, torch.zeros_like(piece.param) if tensor is None else tensor)
            for piece, tensor in zip(self.pieces, tensors, strict=True)
        ]
        if self.padding:
            views.append(views[0].new_zeros((self.padding, *self.piece_shape[1:])))
        return views[0] if len(views) == 1 else torch.cat(views)

    def pack_weights(self) -> Tensor:
        """The weights, packed."""
        return self.pack([piece.param for piece in self.pieces])

    def pack_gradients(self) -> Tensor:
        """The local gradients, packed."""
        return self.pack([piece.param.grad for piece in self.pieces])

    def unpack_weights(self, packed: Tensor) -> None:
        """Write packed weights (at least the pieces' total, ...) into the parameters present."""
        parts = packed[: sum(self.lengths)].split(self.lengths)
        for index, (piece, part) in enumerate(zip(self.pieces, parts, strict=True)):
            weight = self.view(piece, piece.param)
            if index not in self.absent and weight.data_ptr() != part.data_ptr():
                weight.copy_(part)


class BucketOptimizer(torch.optim.Optimizer):
    """What AdamW and Muon share on one process: reduce, measure, step, save.

    A subclass packs a parameter group into buckets, makes their state and steps one bucket.
    Rates are read from param_groups at every step, so a schedule may write them there.
    """

    world_size = 1
    rank = 0

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.buckets: list[Bucket] = []
        self.reduced = False
        super().__init__(params, defaults)

    @abstractmethod
    def make_buckets(self, group_index: int, group: dict[str, Any]) -> list[Bucket]:
        """Pack a parameter group."""

    @abstractmethod
    def make_state(self, bucket: Bucket) -> dict[str, Any]:
        """The bucket's state before the first step."""

    @abstractmethod
    def update(self, bucket: Bucket, weight: Tensor, gradient: Tensor) -> None:
        """Step `weight` in place; both float32, (shard_len, ...)."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its "initial_lr" is its "lr" unless it brings one."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_lr", group["lr"])
        for param in group["params"]:
            if not param.is_contiguous():
                raise ValueError(
                    f"parameter of shape {tuple(param.shape)} has strides {param.stride()}; "
                    "make it contiguous before building the optimizer"
                )
        # state is made here, not at the first step: a checkpoint of step 0 already holds all of it
        for bucket in self.make_buckets(len(self.param_groups) - 1, group):
            bucket.state = self.make_state(bucket)
            self.buckets.append(bucket)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients over all ranks into the slices this rank owns."""
        for bucket in self.buckets:
            # on one process a missing gradient means "leave this parameter as it is", as in torch
            grads = [piece.param.grad for piece in bucket.pieces]
            bucket.absent = [index for index, grad in enumerate(grads) if grad is None]
            empty = len(bucket.absent) == len(grads)
            bucket.gradient = None if empty else bucket.pack_gradients()
        self.reduced = True

    @torch.no_grad()
    def gradient_square_sum(self) -> Tensor:
        """Sum of squares of the averaged gradient this rank owns: 0-d float32.

        Its sum over all ranks and optimizers is the square of the global gradient norm.
        """
        if not self.reduced:
            self.reduce_gradients()
        total = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        for bucket in self.buckets:
            if bucket.gradient is not None:
                norm = torch.linalg.vector_norm(bucket.gradient, dtype=torch.float32)
                total += norm.square()
        return total

    @torch.no_grad()
    def step(self, grad_scale: Tensor | float = 1.0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights by the averaged gradient times `grad_scale` (0-d tensor or number)."""
        if not self.reduced:
            self.reduce_gradients()
        for bucket in self.buckets:
            if bucket.gradient is None:
                continue
            # the step is computed in float32, in place where the weights are float32 already
            weight = self.owned_weights(bucket)
            weight_fp32, gradient = weight.float(), bucket.gradient.float()
            if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
                gradient = gradient * grad_scale
            # dropped before the update, which needs memory of its own for the largest bucket
            bucket.gradient = None
            self.update(bucket, weight_fp32, gradient)
            if weight_fp32 is not weight:
                weight.copy_(weight_fp32)
            self.publish(bucket, weight)
        self.finish()
        self.reduced = False

    def owned_weights(self, bucket: Bucket) -> Tensor:
        """The weights this rank steps, (shard_len, ...); a view where possible."""
        return bucket.pack_weights()

    def publish(self, bucket: Bucket, weight: Tensor) -> None:
        """Bring stepped weights into the parameters of every rank; may end only in finish()."""
        bucket.unpack_weights(weight)

    def finish(self) -> None:
        """Wait until every published weight is in place."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, reduced ones too."""
        super().zero_grad(set_to_none)
        for bucket in self.buckets:
            bucket.gradient = None
        self.reduced = False

    def state_dict(self) -> dict[str, Any]:
        """What this rank owns, as plain tensors and numbers (live tensors, not copies)."""
        return {
            "state": {index: dict(bucket.state) for index, bucket in enumerate(self.buckets)},
            "param_groups": super().state_dict()["param_groups"],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy what state_dict() gave to this rank of an equal run.

        Raises ValueError where the state is of other shapes: another model or number of ranks.
        """
        loaded = state_dict["state"]
        expected, found = _shapes(self.state_dict()["state"]), _shapes(loaded)
        if expected != found:
            raise ValueError(
                f"the optimizer state has the shapes {found}, rank {self.rank} of "
                f"{self.world_size} needs {expected}; load it with the model and the number of "
                "ranks that saved it"
            )
        # the base class takes the groups; the tensors are copied into place, where the buckets and
        # possibly a captured graph point to
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, bucket in enumerate(self.buckets):
            for name, value in loaded[index].items():
                if isinstance(value, Tensor):
                    bucket.state[name].copy_(value)
                else:
                    bucket.state[name] = value


class ShardedBuckets(BucketOptimizer):
    """Mixin before AdamW or Muon: each rank of the default process group owns a slice of a bucket.

    A missing gradient counts as zeros, since another rank may have one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not dist.is_initialized():
            raise ValueError(
                f"{type(self).__name__} needs a process group: start with torchrun and call "
                "setup_training() first, or use the class without Dist"
            )
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.gathering: list[tuple[Callable[[], None], Bucket, Tensor]] = []
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients over all ranks into the slices this rank owns."""
        # all are started before the first is waited for: the network is busy throughout
        waits: list[Callable[[], None]] = []
        for bucket in self.buckets:
            bucket.gradient, wait = reduce_scatter_mean(bucket.pack_gradients())
            waits.append(wait)
        for wait in waits:
            wait()
        self.reduced = True

    def owned_weights(self, bucket: Bucket) -> Tensor:
        """This rank's slice of the packed weights, a copy."""
        start = self.rank * bucket.shard_len
        return bucket.pack_weights()[start : start + bucket.shard_len].clone()

    def publish(self, bucket: Bucket, weight: Tensor) -> None:
        """Start gathering the bucket while the next one is stepped."""
        whole = weight.new_empty((self.world_size * bucket.shard_len, *weight.shape[1:]))
        self.gathering.append((all_gather(weight, whole), bucket, whole))

    def finish(self) -> None:
        """Write the gathered weights into the parameters."""
        for wait, bucket, whole in self.gathering:
            wait()
            bucket.unpack_weights(whole)
        self.gathering.clear()


def _shapes(states: dict[int, dict[str, Any]]) -> dict[int, dict[str, tuple[int, ...]]]:
    return {
        index: {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        for index, state in states.items()
    }
