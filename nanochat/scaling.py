"""Depth -> every size: width, heads, parameters, FLOPs, rates, horizon. Pure arithmetic.

The conventions are nanochat's: width 64 * depth rounded up to whole 128-wide heads, a token counts
6 FLOPs for each parameter outside the embedding, plus attention.
"""

import math
from dataclasses import dataclass

HEAD_DIM = 128
WIDTH_PER_LAYER = 64
VOCAB_MULTIPLE = 128  # whole tensor-core tiles in the head's products, and any even world size
REFERENCE_WIDTH = 768  # AdamW rates were tuned at depth 12; they scale as width^-0.5 from there


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by what they do; the padded rows of the vocabulary are counted."""

    embedding: int
    head: int
    matrices: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices


def model_width(depth: int) -> int:
    """Channels of a model of `depth` layers: the next whole number of heads from 64 * depth."""
    if depth < 1:
        raise ValueError(f"depth {depth} must be at least 1")
    return math.ceil(depth * WIDTH_PER_LAYER / HEAD_DIM) * HEAD_DIM


def num_kv_heads(num_heads: int, wanted: int) -> int:
    """Key/value heads: `wanted`, or num_heads where wanted is -1.

    Raises  ValueError unless it divides num_heads.
    """
    kv_heads = num_heads if wanted == -1 else wanted
    if kv_heads < 1 or num_heads % kv_heads:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(f"n_kv_head {wanted} does not divide {num_heads} heads; use {divisors}")
    return kv_heads


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of VOCAB_MULTIPLE."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def count_parameters(
    n_layer: int, n_embd: int, n_head: int, n_kv_head: int, vocab_size: int
) -> ParameterCount:
    """Parameters of a GPT with those sizes."""
    head_dim = n_embd // n_head
    attention = n_embd * head_dim * (n_head + 2 * n_kv_head) + n_embd * n_embd
    vocab = padded_vocab_size(vocab_size) * n_embd
    return ParameterCount(vocab, vocab, n_layer * (attention + 8 * n_embd**2))


def flops_per_token(
    parameters: ParameterCount, n_layer: int, n_embd: int, sequence_len: int, causal: bool
) -> int:
    """Training FLOPs of a token, forward and backward.

    causal  True counts only the pairs a causal model looks at, half of them; False is nanochat's
            formula, 12 * layers * width * T for attention whatever the mask.
    """
    attention = (6 if causal else 12) * n_layer * n_embd * sequence_len
    return 6 * (parameters.total - parameters.embedding) + attention


def adamw_rate_scale(n_embd: int) -> float:
    """Factor of the embedding's and the head's rate: (width / 768)^-0.5."""
    return (n_embd / REFERENCE_WIDTH) ** -0.5


def accumulation_steps(total: int, device_batch: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches a rank runs for one optimizer step over `total` tokens.

    Raises  ValueError if the micro-batches of all ranks do not divide `total`, or are none.
    """
    if min(device_batch, sequence_len) < 1:
        raise ValueError(
            f"device_batch_size {device_batch} and max_seq_len {sequence_len} must be at least 1"
        )
    tokens = device_batch * sequence_len * world_size
    if total < 1 or total % tokens:
        lower = max(total // tokens, 1) * tokens
        raise ValueError(
            f"total_batch_size {total:,} is not a multiple of the {tokens:,} tokens of a "
            f"micro-batch (device_batch_size {device_batch} x max_seq_len {sequence_len} x "
            f"{world_size} ranks); use --total_batch_size={lower} or another --device_batch_size"
        )
    return total // tokens


def num_iterations(
    wanted: int,
    target_flops: float,
    param_data_ratio: float,
    total_batch_size: int,
    num_parameters: int,
    flops_per_token: int,
) -> int:
    """Optimizer steps of a run: the first of the three wishes that is positive decides.

    wanted            steps
    target_flops      FLOPs of the whole run
    param_data_ratio  tokens for each parameter (20 is Chinchilla's, arXiv:2203.15556)
    Raises  ValueError if none is positive.
    """
    if wanted > 0:
        return wanted
    if target_flops > 0:
        return max(1, round(target_flops / (flops_per_token * total_batch_size)))
    if param_data_ratio > 0:
        return max(1, int(param_data_ratio * num_parameters) // total_batch_size)
    raise ValueError(
        "no horizon: set --num_iterations, --target_flops or --target_param_data_ratio above 0"
    )
