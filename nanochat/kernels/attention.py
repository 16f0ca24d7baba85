"""Causal attention with grouped heads, an optional window and an optional key/value cache.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s   over  t - window < s <= t

Shapes  q_BTHD, y: (B, T, H, D); k_BSHD, v_BSHD: (B, S, Hkv, D), H a multiple of Hkv.
        The queries are the last T valid positions: of S, or of kv_lengths_B (B,) where given.
Dtypes  float32, bfloat16, float16; softmax in float32.
Saves   q, k, v and the scores (reference); q, k, v, y and the row sums (all others).
Cost    4 D flops for each visible pair of positions and each head.
Error   a window without a cache is refused by sdpa: its dense mask leaves the fast kernels.
        With a cache (few queries) every implementation but the reference attends through sdpa.
Source  arXiv:1706.03762; grouped queries arXiv:2305.13245; windows arXiv:2004.05150.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.kernels.registry import Cost, Needs, Op
from nanochat.kernels.workloads import HEAD_DIM, Workload


def visible(
    T: int, S: int, device: torch.device, window: int | None, kv_lengths_B: Tensor | None
) -> Tensor:
    """Mask (B or 1, 1, T, S): True where the query may look."""
    ends = torch.full((1,), S, device=device) if kv_lengths_B is None else kv_lengths_B
    query = ends[:, None] - T + torch.arange(T, device=device)  # (B, T) positions
    # (B or 1, 1, T, S): how far each key lies in the past of each query
    distance = query[:, None, :, None] - torch.arange(S, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def reference(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    window: int | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Tensor:
    """The definition: all scores in memory."""
    T, S, groups = q_BTHD.shape[1], k_BSHD.shape[1], q_BTHD.shape[2] // k_BSHD.shape[2]
    q = q_BTHD.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k_BSHD, v_BSHD))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    mask = visible(T, S, q.device, window, kv_lengths_B)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


# cuDNN is faster than FlashAttention-2 on Hopper (1.7 to 2.3 times in training), slower on SM120
SDPA_ORDER = {
    9: [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    12: [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION],
}
SDPA_LAST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa_order(device: torch.device) -> list[SDPBackend]:
    """Kernels that scaled_dot_product_attention tries there, in order."""
    major = torch.cuda.get_device_capability(device)[0]
    return SDPA_ORDER.get(major, SDPA_ORDER[12]) + SDPA_LAST


def sdpa(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    window: int | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention; a mask only where there is a cache.

    Raises  ValueError for a window shorter than the sequence, without a cache.
    """
    T, S = q_BTHD.shape[1], k_BSHD.shape[1]
    if kv_lengths_B is None and window is not None and window < S:
        raise ValueError(
            f"sdpa has no kernel for a window of {window} in {S} positions, only a dense mask; "
            "choose --kernels=attention=flex, attention=varlen or a flash-attention package"
        )
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    # is_causal keeps the fast kernels; a mask tensor is for the few queries of decoding
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if kv_lengths_B is None and T == S:
        options["is_causal"] = True
    else:
        options["attn_mask"] = visible(T, S, q.device, window, kv_lengths_B)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    with sdpa_kernel(sdpa_order(q.device), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def without_cache(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation of whole sequences, (q, k, v, window) -> y; sdpa where there is a cache."""

    @functools.wraps(call)
    def implementation(
        q_BTHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        window: int | None = None,
        kv_lengths_B: Tensor | None = None,
    ) -> Tensor:
        if kv_lengths_B is not None or q_BTHD.shape[1] != k_BSHD.shape[1]:
            return sdpa(q_BTHD, k_BSHD, v_BSHD, window, kv_lengths_B)
        return call(q_BTHD, k_BSHD, v_BSHD, window)

    return implementation


@functools.cache
def _block_mask(T: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # imports the compiler

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query >= key
        return near if window is None else near & (query - key < window)

    return create_block_mask(mask, None, None, T, T, device=device)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@without_cache
def flex(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, window: int | None) -> Tensor:
    """torch's FlexAttention, compiled, which skips the blocks outside the window."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    block_mask = _block_mask(q.shape[2], window, q.device)
    gqa = q.shape[1] != k.shape[1]
    return _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=gqa).transpose(1, 2)


@without_cache
def varlen(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, window: int | None) -> Tensor:
    """torch's own FlashAttention-2 with a window, through torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, _ = q_BTHD.shape
    groups = H // k_BSHD.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BSHD, v_BSHD))
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    # packed sequences of one length: sequence b begins at token b T
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    left = -1 if window is None else window - 1
    y = varlen_attn(q, k, v, starts, starts, T, T, window_size=(left, 0))
    assert isinstance(y, Tensor)
    return y.view_as(q_BTHD)


# implementation -> module whose flash_attn_func it calls
FLASH_MODULES = {
    "fa2": "flash_attn.flash_attn_interface",
    "fa4": "flash_attn.cute",
    "fa3": "flash_attn_interface",
}


def flash(module: str) -> Callable[..., Tensor]:
    """flash_attn_func of an installed flash-attention package."""

    @without_cache
    def call(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, window: int | None) -> Tensor:
        flash_attn_func = importlib.import_module(module).flash_attn_func
        sides = {} if window is None else {"window_size": (window - 1, 0)}
        y = flash_attn_func(q_BTHD, k_BSHD, v_BSHD, causal=True, **sides)
        return y[0] if isinstance(y, tuple) else y  # some versions add the row sums

    return call


def needs_cuda(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why a CUDA kernel of 16-bit types cannot run there, or ""."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    return "" if dtype.itemsize == 2 else f"takes bfloat16 and float16, not {dtype}"


def needs_package(module: str, device: torch.device, dtype: torch.dtype) -> str:
    """Reason why flash_attn_func of `module` cannot run there, or ""."""
    reason = needs_cuda(device, dtype)
    if reason:
        return reason
    try:
        call = getattr(importlib.import_module(module), "flash_attn_func", None)
    except ImportError as error:
        return f"{module} is not installed ({error})"
    return "" if call is not None else f"{module} has no flash_attn_func"


def flash_on_hopper(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why `auto` does not choose FlashAttention-3 or 4, or "": they are made for Hopper."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if 9 <= major < 12:
        return ""
    return "made for Hopper and data-center Blackwell; slower than fa2 elsewhere"


def only_windows(device: torch.device, dtype: torch.dtype) -> str:
    """Reason against an implementation that windows alone make worthwhile."""
    return "slower than sdpa without a window"


def cost(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    window: int | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Cost:
    """Two products over the visible pairs; backward four, and the scores again, which nothing
    keeps. q, k, v and y; with dy, dq, dk and dv backward."""
    T, S = q_BTHD.shape[1], k_BSHD.shape[1]
    span = S if window is None else min(window, S)
    pairs = sum(min(S - T + t + 1, span) for t in range(T))
    moved = (2 * q_BTHD.numel() + k_BSHD.numel() + v_BSHD.numel()) * q_BTHD.element_size()
    product = 2 * q_BTHD.shape[0] * q_BTHD.shape[2] * q_BTHD.shape[3] * pairs
    return Cost(2 * product, moved, Cost(5 * product, 2 * moved))


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """One token, grouped heads, caches (one with a window), then d12's heads."""
    for B, T, S, H, Hkv, D, window, lengths in (
        (1, 1, 1, 1, 1, 8, None, None),
        (2, 17, 17, 4, 2, 64, None, None),
        (2, 3, 19, 2, 1, 32, 7, (19, 8)),
        (2, 3, 16, 4, 2, 32, None, (9, 16)),
        (1, 64, 64, 6, 6, 128, None, None),
    ):
        yield (
            torch.randn(B, T, H, D, device=device, dtype=dtype),
            torch.randn(B, S, Hkv, D, device=device, dtype=dtype),
            torch.randn(B, S, Hkv, D, device=device, dtype=dtype),
            window,
            None if lengths is None else torch.tensor(lengths, device=device),
        )


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values of whole sequences."""
    length = w.tokens // w.batch
    return tuple(
        torch.randn(w.batch, length, heads, HEAD_DIM, device=device, dtype=dtype)
        for heads in (w.heads, w.num_kv_heads, w.num_kv_heads)
    )


def add_flash(name: str, auto: Needs) -> None:
    """Register an implementation of FLASH_MODULES."""
    module = FLASH_MODULES[name]
    attention.add(name, flash(module), functools.partial(needs_package, module), auto)


attention = Op(
    "attention", reference, cost, examples, workload,
    summary="PyTorch's kernels and the flash-attention packages, where installed: no score matrix",
)  # fmt: skip
attention.add("flex", flex, needs_cuda, only_windows)
attention.add("varlen", varlen, needs_cuda, only_windows)
add_flash("fa2", only_windows)
attention.add("sdpa", sdpa)
add_flash("fa4", flash_on_hopper)
add_flash("fa3", flash_on_hopper)
