"""What the server counts, for Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from jaxfusion.serving.batcher import Batcher

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self, batcher: Batcher):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.requests = Counter("jaxfusion_requests", "Requests that were answered",
                                ["path", "status"], registry=self.registry)
        self.seconds = Histogram("jaxfusion_request_seconds", "From request to the reply's end",
                                 ["path"], buckets=SECONDS, registry=self.registry)
        self.tokens = Counter("jaxfusion_tokens", "Tokens that were read and written",
                              ["kind"], registry=self.registry)
        for name, about, read in (
            ("queue_length", "Prompts that wait", lambda: batcher.length),
            ("running_prompts", "Prompts that are being answered", lambda: batcher.running),
        ):
            Gauge(f"jaxfusion_{name}", about, registry=self.registry).set_function(read)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def count_tokens(self, read: int, written: int) -> None:
        """Counts tokens of prompts and answers."""
        self.tokens.labels("prompt").inc(read)
        self.tokens.labels("completion").inc(written)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)
