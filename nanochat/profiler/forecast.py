"""How long a training step takes, foreseen from datasheets: a range, and what it assumes.

    seconds of a micro-batch = max(products + attention + traffic, launches)
    seconds of a step        = micro-batches of it + optimizer + communication

    products    FLOPs of every matrix product over a share of the tensor cores' rate
    attention   FLOPs of the pairs a causal model looks at, over a smaller share
    traffic     bytes that everything else reads and writes, over a share of the bandwidth
    launches    what the host needs to start so many operations one by one

The shares are `ASSUMPTIONS`, each with a slow and a fast end: a forecast, until it is measured.

Example, d20 on one H200, 32 x 2048 tokens, kernels in Triton: 6 x 477 million parameters x 65,536
tokens are 188 TFLOP of products, 0.24 to 0.32 s; attention's 21 TFLOP take 0.03 to 0.06 s; 215 GB
of traffic 0.05 to 0.06 s; the optimizer 0.02 to 0.03 s. That is 0.34 to 0.46 s in all, 142 to 192
thousand tokens a second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from nanochat.hardware import Hardware
from nanochat.profiler.activations import FLOAT32, Setup
from nanochat.profiler.footprint import Bucket, buckets, loss_rows

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Span:
    """The slow and the fast end of something unknown."""

    slow: float
    fast: float


# name -> (share or seconds, what it says)
ASSUMPTIONS: dict[str, tuple[Span, str]] = {
    "products": (Span(0.60, 0.80), "of the datasheet's bfloat16 rate in matrix products"),
    "products on GeForce": (Span(0.80, 0.95), "there, where that rate is halved for float32 sums"),
    "attention": (Span(0.35, 0.60), "of the same rate in attention"),
    "attention on GeForce": (Span(0.55, 0.80), "there"),
    "memory": (Span(0.75, 0.92), "of the datasheet's bandwidth in everything else"),
    "NVLink": (Span(0.60, 0.85), "of its rate, after the backward pass and not beside it"),
    "PCIe": (Span(0.25, 0.80), "of its rate, likewise; GeForce passes through the host's memory"),
    "launch": (Span(12e-6, 5e-6), "seconds of the host for each operation, without a CUDA graph"),
}


@dataclass(frozen=True)
class Work:
    """What a step has to do on one device.

    micro_batch products, attention in FLOPs, traffic in bytes, launches; the same of the optimizer
    """

    products: float
    attention: float
    traffic: float
    launches: int
    optimizer_products: float
    optimizer_traffic: float
    optimizer_launches: int
    communication: float  # bytes sent and received by a rank


def _layers(count: Callable[[Setup], float]) -> Callable[[Setup], float]:
    return lambda s: s.model.n_layer * count(s)


def _qk(s: Setup) -> int:
    return (s.model.n_head + s.model.n_kv_head) * s.heads


def _logits(s: Setup) -> int:
    return s.tokens * s.model.vocab_size * 2


def _chunked_loss(reads_and_writes: int) -> Callable[[Setup], float]:
    # logits by kernels; dW in float32 is read and written once for each chunk
    def traffic(s: Setup) -> float:
        chunks = ceil(s.tokens / loss_rows(s))
        return reads_and_writes * _logits(s) + chunks * 2 * FLOAT32 * s.head_numel

    return traffic


NORM = _layers(lambda s: 2 * 8 * s.unit)
POINTWISE_MLP = _layers(lambda s: 5 * 4 * s.unit)

# operation -> implementation -> bytes that it moves in a micro-batch, forward and backward, outside
# matrix products and attention's kernels. Those of the references are counted, see the tests.
TRAFFIC: dict[str, dict[str, Callable[[Setup], float]]] = {
    "rms_norm": dict.fromkeys(("reference", "triton"), lambda s: 2 * 5 * s.unit),
    "add_rms_norm": {"reference": _layers(lambda s: 2 * 11 * s.unit), "triton": NORM},
    "qk_norm_rope": {
        "reference": _layers(lambda s: 73 * _qk(s)),
        "triton": _layers(lambda s: 5 * _qk(s) + 2 * s.model.n_kv_head * s.heads),
    },
    "attention": {"reference": _layers(lambda s: 43 * s.score_numel * 2)},
    "relu2_mlp": {
        "reference": _layers(lambda s: 14 * 4 * s.unit),
        "triton_pointwise": POINTWISE_MLP,
        # inside the products, whose backward reads post once more
        **dict.fromkeys(("triton", "triton_tma"), _layers(lambda s: 4 * s.unit)),
    },
    "linear_cross_entropy": {
        "reference": lambda s: 48 * _logits(s),
        "triton": _chunked_loss(2),
        "triton_min_memory": _chunked_loss(3),
    },
}
# operations started for one layer of fused kernels, and how many more by reference
LAUNCHES, LAUNCHES_OUTSIDE, OPTIMIZER_LAUNCHES = 34, 28, 160
MORE_LAUNCHES = {"attention": 28, "qk_norm_rope": 24, "relu2_mlp": 5}


def work(s: Setup) -> Work:
    """What one step has to do on each device."""
    m, count = s.model, s.parameters
    weights = count.total - count.embedding
    again = s.kernels.get("linear_cross_entropy") == "triton_min_memory"
    products = (6 * weights + (2 * count.head if again else 0)) * s.tokens
    # by reference every pair is computed, and then half of them masked
    pairs = 12 if s.by_reference("attention") else 6
    attention = pairs * m.n_layer * m.n_embd * m.sequence_len * s.tokens

    traffic = sum(
        ways.get(s.kernels.get(op, "reference"), lambda _: 0.0)(s) for op, ways in TRAFFIC.items()
    )
    # weights rounded for the products, their gradients made float32 and added; the embedding's is
    # dense; rows looked up, rounded, and their gradients added
    rounded = 24 if s.itemsize < FLOAT32 else 12
    traffic += rounded * weights + 16 * count.embedding + 32 * s.tokens * m.n_embd
    launches = LAUNCHES_OUTSIDE + m.n_layer * (
        LAUNCHES + sum(more for op, more in MORE_LAUNCHES.items() if s.by_reference(op))
    )

    # AdamW on embedding and head; Muon's momentum, look-ahead, packing and casts on the matrices
    adamw = (80 if s.by_reference("adamw_step") else 28) * (count.embedding + count.head)
    return Work(
        products,
        attention,
        traffic,
        launches,
        newton_schulz_flops(s) / s.world_size,
        (adamw + 90 * count.matrices) / s.world_size,
        OPTIMIZER_LAUNCHES,
        # gradients to the rank that owns them, stepped weights back
        2 * FLOAT32 * count.total * (s.world_size - 1) / s.world_size,
    )


def newton_schulz_flops(s: Setup) -> float:
    """Of all matrices: three products a step, of which kernels compute two by half."""
    way = s.kernels.get("newton_schulz", "reference")

    def of(bucket: Bucket) -> float:
        m, n = sorted((bucket.rows, bucket.columns))
        if way == "reference":
            return bucket.count * NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3)
        if way == "triton_gram" and n >= 2 * m:  # products of m x m, and X at the ends
            return bucket.count * (6 * m * m * n + 14 * m**3)
        return bucket.count * NEWTON_SCHULZ_STEPS * (3 * m * m * n + m**3)

    return sum(map(of, buckets(s.model)))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step at one end of the assumptions, by what takes them."""

    products: float
    attention: float
    traffic: float
    waiting_for_launches: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())


def step_time(s: Setup, gpu: Hardware, end: str) -> StepTime:
    """Seconds of a step on `gpu`; `end` is "slow" or "fast".

    Raises  ValueError for a GPU whose vendor states no rate.
    """
    if gpu.bf16_flops is None:
        raise ValueError(
            f"the vendor states no bfloat16 rate of the {gpu.name}: its times are not known; "
            "measure one with python -m scripts.base_train"
        )

    def share(name: str) -> float:
        return getattr(ASSUMPTIONS[name][0], end)

    w = work(s)
    # float32 products run on TF32 at best, half the rate
    flops = gpu.bf16_flops * (1.0 if s.itemsize < FLOAT32 else 0.5)
    geforce = " on GeForce" if gpu.halved else ""
    product_rate = flops * share(f"products{geforce}")
    bandwidth = gpu.memory_bytes_per_s * share("memory")
    products = w.products / product_rate
    attention = w.attention / (flops * share(f"attention{geforce}"))
    traffic = w.traffic / bandwidth
    waiting = max(0.0, w.launches * share("launch") - products - attention - traffic)
    device = w.optimizer_products / product_rate + w.optimizer_traffic / bandwidth
    link = gpu.link_gb_per_s * 1e9 * share("NVLink" if "NVLink" in gpu.link else "PCIe")
    return StepTime(
        s.micro_batches * products,
        s.micro_batches * attention,
        s.micro_batches * traffic,
        s.micro_batches * waiting,
        max(device, w.optimizer_launches * share("launch")),
        w.communication / link,
    )
