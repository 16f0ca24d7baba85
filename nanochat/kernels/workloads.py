"""Sizes of one call inside a model: what the bench times and the ahead-of-time gate compiles."""

from dataclasses import dataclass, replace

HEAD_DIM = 128
SEQUENCE_LEN = 2048


@dataclass(frozen=True)
class Workload:
    """A micro-batch of `tokens` tokens in a model of `layers` blocks of `width` channels."""

    name: str
    layers: int
    width: int
    tokens: int = 65_536
    vocab_size: int = 65_536
    kv_heads: int = 0  # key/value heads; 0 is as many as query heads

    @property
    def heads(self) -> int:
        return self.width // HEAD_DIM

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def batch(self) -> int:
        """Sequences of SEQUENCE_LEN tokens."""
        return max(1, self.tokens // SEQUENCE_LEN)

    def small(self, tokens: int) -> "Workload":
        """The same matrices with fewer tokens and one layer."""
        return replace(self, layers=1, tokens=tokens)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("d12", 12, 768),
        Workload("d20", 20, 1280),
        Workload("d32", 32, 2048),
    )
}
