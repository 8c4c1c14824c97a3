"""Everything that the parts of one server share: its models and who may use them, figures for Prometheus, and a time limit that
never swallows a cancellation.
"""

import asyncio
import functools
import re
import secrets
import time
from base64 import b64decode
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trigflow.conditions import quoted
from trigflow.data.photo import read_photo
from trigflow.models.editing import edit_of
from trigflow.runtime.errors import UserError
from trigflow.samplers import Edit
from trigflow.serve.batching import Batcher, Drawn
from trigflow.serve.drawing import Order, draw_together
from trigflow.serve.limits import Limits, check_token
from trigflow.serve.noise import NoiseSource
from trigflow.serve.offers import Offer
from trigflow.serve.requests import EditRequest, FrameRequest, ImagesRequest, PictureRequest, bounded
from trigflow.serve.wire import encode

Result = TypeVar("Result")
Figure = TypeVar("Figure", Counter, Gauge, Histogram)


async def within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled after this time.

    `asyncio.wait_for` of Python 3.11 and before returns the result when it is cancelled in the moment the work is done, and
    the task goes on as if nobody had cancelled it.

    Raises:
        TimeoutError: `asyncio.TimeoutError`, when the time is over.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise asyncio.TimeoutError
    return task.result()


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._made(Counter, "requests", "HTTP requests by path and status", ["path", "status"])
        self.images = self._made(Counter, "images", "Pictures drawn", ["model"])
        self.frames = self._made(Counter, "frames", "Frames sent to streams", ["model"])
        why = "Work not done: the client left, a newer request of the stream took its place"
        self.dropped = self._made(Counter, "dropped", why, ["reason"])
        self.streams = self._made(Gauge, "streams", "Open streams")
        self.closed = self._made(Counter, "closed", "Streams that the server closed", ["code"])
        self.batch = self._made(Histogram, "batch_images", "Pictures drawn at once", ["model"], buckets=SIZES)
        what = "Seconds of a request in the queue, in its batch (network) and in encoding"
        self.seconds = self._made(Histogram, "seconds", what, ["model", "part"], buckets=SECONDS)
        self.queue = self._made(Gauge, "queue_images", "Pictures that wait to be drawn", ["model"])

    def _made(self, kind: Callable[..., Figure], name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Figure:
        return kind(f"trigflow_{name}", text, labels, registry=self.registry, **more)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class Service:
    """Models with their queues and workers, limits, figures, and who may use them; arguments and errors as of `create_app`."""

    def __init__(self, offers: Sequence[Offer], limits: Limits, token: str | None = None, origins: Sequence[str] = ()) -> None:
        if token is not None:
            check_token(token)
        if len({offer.name for offer in offers}) < max(1, len(offers)):
            names = ", ".join(offer.name for offer in offers) or "none"
            raise UserError(f"{names} to serve; expected a student, a teacher, or one of each; offer others elsewhere")
        self.offers = {offer.name: offer for offer in offers}
        self.default = offers[0].name
        self.limits = limits
        self.token = token
        self.origins = {normal_origin(origin) for origin in ([origins] if isinstance(origins, str) else origins)}
        self.metrics = Metrics()
        self.images_request = bounded(ImagesRequest, limits, offers)
        self.edit_request = bounded(EditRequest, limits, offers)
        self.frame_request = bounded(FrameRequest, limits, offers)
        self.encoders = ThreadPoolExecutor(2, "trigflow-encoder")
        self.readers = ThreadPoolExecutor(1, "trigflow-reader")
        self.batchers = {offer.name: self._batcher(offer) for offer in offers}
        self.streams = 0

    def _batcher(self, offer: Offer) -> Batcher:
        def on_batch(pictures: int) -> None:
            self.metrics.images.labels(offer.name).inc(pictures)
            self.metrics.batch.labels(offer.name).observe(pictures)

        draws = [functools.partial(draw_together, drawer, NoiseSource(offer.model)) for drawer in offer.drawers]
        batcher = Batcher(draws, self.limits, on_batch)
        self.metrics.queue.labels(offer.name).set_function(lambda: batcher.waiting)
        return batcher

    def start(self) -> None:
        """Start the workers."""
        for batcher in self.batchers.values():
            batcher.start()

    def close(self) -> None:
        """End the workers, after the batches at hand."""
        for batcher in self.batchers.values():
            batcher.close()

    @property
    def healthy(self) -> bool:
        """Whether every model has its workers."""
        return all(batcher.alive for batcher in self.batchers.values())

    async def order(self, request: PictureRequest) -> tuple[str, Order]:
        """Name of the model and the order of a request; large text encoders read beside the event loop. Raises a UserError for
        numbers that this model does not take."""
        name = request.model or self.default
        ordered = functools.partial(self.offers[name].order, **request.order())
        if not hasattr(self.offers[name].model.conditioner.inputs.get("text"), "kept"):
            return name, ordered()
        return name, await asyncio.get_running_loop().run_in_executor(self.readers, ordered)

    async def edit_order(self, request: EditRequest) -> tuple[str, Order]:
        """The same of a request with a picture, which is read beside the event loop."""
        name, order = await self.order(request)

        def edit() -> Edit:
            offer, keep = self.offers[name], request.keep
            files = [None if text is None else b64decode(text) for text in (request.picture, request.mask)]
            picture, mask = read_photo(files[0] or b"", offer.shape, mask=files[1], keep=keep, pixels=self.limits.edit_pixels)
            return edit_of(offer.model, picture, request.strength, mask, keep)

        return name, replace(order, edit=await asyncio.get_running_loop().run_in_executor(self.encoders, edit))

    async def encode(self, name: str, drawn: Sequence[Drawn], format: str) -> tuple[bytes, dict[str, float]]:
        """Pictures of a model as bytes, and the seconds they were in the queue, in the network and here, which are recorded."""
        begun = time.monotonic()
        pictures = torch.cat([one.images for one in drawn])
        if format == "raw":  # sooner done than handed over
            content = encode(pictures, format)
        else:
            content = await asyncio.get_running_loop().run_in_executor(self.encoders, encode, pictures, format)
        seconds = {
            "queue": max(one.queue for one in drawn),
            "network": sum(one.network for one in drawn),
            "encode": time.monotonic() - begun,
        }
        for part, value in seconds.items():
            self.metrics.seconds.labels(name, part).observe(value)
        return content, seconds

    def knows(self, token: str | None) -> bool:
        """Whether this is the token, compared in time that does not depend on where it differs."""
        return self.token is None or secrets.compare_digest((token or "").encode(), self.token.encode())

    def welcomes(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of this origin may open a stream: one from here, one of `origins`, or no page at all."""
        if origin is None:
            return True
        try:
            origin = normal_origin(origin)
            return origin in self.origins or origin == normal_origin(f"{origin.partition('://')[0]}://{host or ''}")
        except UserError:
            return False


PORTS = {"http": 80, "https": 443}


def normal_origin(text: str) -> str:
    """An origin as browsers send it: `scheme://host:port` in small letters, without the port that the scheme has by itself.
    Raises a UserError unless it is a scheme and a host, and a port or none; `*` and `null` name no page."""
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        host, port = "", None
    if not host or "@" in text or re.search(r"\s", text) or not re.fullmatch(r"[^/]+://[^/?#]+/?", text):
        raise UserError(
            f"origin {quoted(text)}; expected scheme and host of a page, such as https://example.org or http://localhost:3000; "
            "correct --origins"
        )
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, PORTS.get(parts.scheme)) else f":{port}")
