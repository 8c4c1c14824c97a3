"""Figures of the running server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trigflow_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        self.images = Counter("trigflow_images", "Pictures drawn", ["model"], registry=self.registry)
        self.frames = Counter("trigflow_frames", "Frames sent to streams", ["model"], registry=self.registry)
        self.dropped = Counter(
            "trigflow_dropped",
            "Work not done: the client left, a newer request of the stream took its place",
            ["reason"],
            registry=self.registry,
        )
        self.streams = Gauge("trigflow_streams", "Open streams", registry=self.registry)
        self.closed = Counter("trigflow_closed", "Streams that the server closed", ["code"], registry=self.registry)
        self.batch = Histogram(
            "trigflow_batch_images", "Pictures drawn at once", ["model"], buckets=SIZES, registry=self.registry
        )
        self.seconds = Histogram(
            "trigflow_seconds",
            "Seconds of a request in the queue, in its batch (network) and in encoding",
            ["model", "part"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue = Gauge("trigflow_queue_images", "Pictures that wait to be drawn", ["model"], registry=self.registry)

    def watch_queue(self, name: str, waiting: Callable[[], int]) -> None:
        """Report `waiting()` as the queue of this model."""
        self.queue.labels(name).set_function(waiting)

    def observe(self, name: str, queue: float, network: float, encode: float) -> None:
        """Record the seconds of one request or frame."""
        for part, seconds in (("queue", queue), ("network", network), ("encode", encode)):
            self.seconds.labels(name, part).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
