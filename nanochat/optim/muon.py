"""Muon on one process, and sharded over the ranks of a process group (DistMuon).

Both run `muon_` on stacks of matrices of one shape; they differ only in how gradients come in and
weights go out (sharding.py).
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.newton_schulz import (
    MUON_COEFFICIENTS,
    POLAR_EXPRESS_COEFFICIENTS,
    Coefficients,
    newton_schulz,
)
from nanochat.optim.sharding import Bucket, BucketOptimizer, Piece, ShardedBuckets

COEFFICIENTS = {"muon": MUON_COEFFICIENTS, "polar_express": POLAR_EXPRESS_COEFFICIENTS}


def muon_(
    weight_LMN: Tensor,
    gradient_LMN: Tensor,
    momentum_LMN: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    coefficients: Coefficients,
    compute_dtype: torch.dtype,
) -> None:
    """One step of Muon in place, on stacks (L, m, n) of float32 matrices.

    M <- lerp(M, G, 1 - mu);  O = orthogonalised lerp(G, M, mu), the Nesterov look-ahead
    W <- W (1 - lr wd) - lr sqrt(max(1, m / n)) O
    Source: kellerjordan.github.io/posts/muon; torch.optim.Muon with its default adjust_lr_fn.
    """
    # momentum in float32; the look-ahead weighs the newest gradient once more (Nesterov)
    m, n = weight_LMN.shape[-2:]
    momentum_LMN.lerp_(gradient_LMN, 1 - momentum)
    lookahead = gradient_LMN.lerp(momentum_LMN, momentum)
    # all singular values become about 1: each direction of the update moves equally far
    orthogonal = newton_schulz(lookahead, coefficients, compute_dtype)
    # elements of an orthogonal m x n matrix are about 1 / sqrt(max(m, n)) in size; tall matrices
    # are scaled up, so that each output moves as far as it would with a square one
    weight_LMN.mul_(1 - lr * weight_decay)
    weight_LMN.add_(orthogonal, alpha=-lr * max(1.0, m / n) ** 0.5)


class Muon(BucketOptimizer):
    """Momentum, orthogonalised by Newton-Schulz, for the matrices inside a transformer.

    params         2-D parameters or groups of them; one without a gradient is left as it is.
    coefficients   "muon" or "polar_express".
    compute_dtype  of the Newton-Schulz steps.
    A group's "row_splits", a tuple of row counts, says that each of its parameters packs that many
    matrices along its rows (query, key and value, say); each is orthogonalised on its own.
    Equal to torch.optim.Muon with the same lr, momentum and weight_decay and its other defaults
    (nesterov=True, adjust_lr_fn=None or "original"), up to the rounding of bfloat16 products.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        coefficients: str = "muon",
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"coefficients {coefficients!r} are unknown; choose {' or '.join(COEFFICIENTS)}"
            )
        self.coefficients = COEFFICIENTS[coefficients]
        self.compute_dtype = compute_dtype
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "row_splits": None})

    def make_buckets(self, group_index: int, group: dict[str, Any]) -> list[Bucket]:
        """A bucket for each matrix shape: a stack that is orthogonalised at once."""
        stacks: dict[tuple[int, int, torch.dtype], list[Piece]] = {}
        for param in group["params"]:
            if param.ndim != 2:
                raise ValueError(
                    f"Muon takes 2-D parameters, not one of shape {tuple(param.shape)}; "
                    "give it to AdamW"
                )
            rows, columns = param.shape
            # q, k and v share a matrix for one large product, but are three maps: orthogonalised
            # as one, the singular values of one would depend on the others'
            row_counts = group["row_splits"] or (rows,)
            if sum(row_counts) != rows or min(row_counts) < 1:
                raise ValueError(
                    f"row_splits {row_counts} must be positive and add up to the {rows} rows of "
                    f"the parameter of shape {tuple(param.shape)}"
                )
            for count, stop in zip(row_counts, accumulate(row_counts), strict=True):
                piece = Piece(param, (stop - count) * columns, stop * columns)
                stacks.setdefault((count, columns, param.dtype), []).append(piece)
        # d12: 72 matrices in three stacks, 48 of 768 x 768 (q, k, v, attention's projection), 12 of
        # 3072 x 768 and 12 of 768 x 3072, so a step needs three batched Newton-Schulz runs
        return [
            Bucket(group_index, pieces, (1, m, n), self.world_size)
            for (m, n, _), pieces in stacks.items()
        ]

    def make_state(self, bucket: Bucket) -> dict[str, Any]:
        """The momentum of the stack."""
        return {"momentum_buffer": bucket.new_state()}

    def update(self, bucket: Bucket, weight: Tensor, gradient: Tensor) -> None:
        """muon_ with the group's rates; the momentum of absent matrices stays."""
        group = self.param_groups[bucket.group_index]
        momentum_LMN = bucket.state["momentum_buffer"]
        # the stack is stepped whole; what had no gradient gets its momentum back
        absent_LMN = momentum_LMN[bucket.absent] if bucket.absent else None
        muon_(
            weight,
            gradient,
            momentum_LMN,
            **{name: group[name] for name in ("lr", "momentum", "weight_decay")},
            coefficients=self.coefficients,
            compute_dtype=self.compute_dtype,
        )
        if absent_LMN is not None:
            momentum_LMN[bucket.absent] = absent_LMN


class DistMuon(ShardedBuckets, Muon):
    """Muon with gradients, momentum and Newton-Schulz sharded over the ranks, by whole matrices."""
