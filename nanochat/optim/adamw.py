"""AdamW on one process, and sharded over the ranks of a process group (DistAdamW).

Both run the operation `adamw_step`; they differ only in how gradients come in and weights go out
(sharding.py).
"""

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.adamw_step import adamw_step
from nanochat.optim.sharding import Bucket, BucketOptimizer, Piece, ShardedBuckets

# Below this many elements a parameter shares a bucket: sending it costs latency, not bandwidth.
SMALL_NUMEL = 65_536


class AdamW(BucketOptimizer):
    """Decoupled weight decay Adam (arXiv:1711.05101), equal to torch.optim.AdamW.

    params: parameters or groups of any shape; a parameter without a gradient is left as it is.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def make_buckets(self, group_index: int, group: dict[str, Any]) -> list[Bucket]:
        """A bucket for each parameter, so that one without a gradient can be skipped."""
        return [
            Bucket(group_index, [Piece(param, 0, param.numel())], (-1,), self.world_size)
            for param in group["params"]
        ]

    def make_state(self, bucket: Bucket) -> dict[str, Any]:
        """Step count and both moments."""
        return {"step": 0, "exp_avg": bucket.new_state(), "exp_avg_sq": bucket.new_state()}

    def update(self, bucket: Bucket, weight: Tensor, gradient: Tensor) -> None:
        """adamw_step with the group's rates."""
        state, group = bucket.state, self.param_groups[bucket.group_index]
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        rates = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
        adamw_step(weight, gradient, *moments, state["step"], *rates)


class DistAdamW(ShardedBuckets, AdamW):
    """AdamW with gradients, moments and step sharded over the ranks (ZeRO-2, arXiv:1910.02054)."""

    def make_buckets(self, group_index: int, group: dict[str, Any]) -> list[Bucket]:
        """Large parameters alone, small ones of a dtype together."""
        packed: dict[torch.dtype | int, list[Piece]] = {}
        # an element belongs to one rank, whatever its parameter: any shape and world size works
        for param in group["params"]:
            key = param.dtype if param.numel() < SMALL_NUMEL else id(param)
            packed.setdefault(key, []).append(Piece(param, 0, param.numel()))
        return [Bucket(group_index, pieces, (-1,), self.world_size) for pieces in packed.values()]
