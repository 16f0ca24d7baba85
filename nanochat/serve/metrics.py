"""Numbers for Prometheus: GET /metrics.

Where several processes serve one port, each scrape reaches one of them: prometheus_client then
keeps the numbers in files that all of them read (workers.py says where), and the sums are shown.
"""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name, set by workers.py
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """What one server has done."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests",
            "Requests that got an answer",
            ["route", "status"],
            registry=registry,
        )
        self.tokens = Counter("nanochat_tokens", "Tokens", ["kind"], registry=registry)
        self.answers = Counter(
            "nanochat_answers", "Answers by how they ended", ["finish_reason"], registry=registry
        )
        self.first_token = Histogram(
            "nanochat_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "nanochat_answer_seconds",
            "From a request to the end of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self._gauges = {
            name: Gauge(f"nanochat_{name}", text, registry=registry, multiprocess_mode="livesum")
            for name, text in (
                ("active", "Answers being written"),
                ("waiting", "Requests that wait for a slot"),
                ("slots", "Answers that can be written at a time"),
                ("healthy", "Processes that answer"),
                ("failures", "Steps and requests that failed"),
            )
        }

    def set(self, **gauges: float) -> None:
        """How things are now. Another process may be the one that is asked."""
        for name, value in gauges.items():
            self._gauges[name].set(value)

    def text(self) -> bytes:
        """In Prometheus' format."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)
        return generate_latest(together)
