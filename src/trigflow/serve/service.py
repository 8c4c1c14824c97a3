"""Everything that the parts of one server share."""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch

from trigflow.conditions import quoted
from trigflow.runtime.errors import UserError
from trigflow.serve.batching import Batcher, Drawn
from trigflow.serve.drawing import Order, draw_together
from trigflow.serve.limits import Limits, check_token
from trigflow.serve.metrics import Metrics
from trigflow.serve.noise import NoiseSource
from trigflow.serve.offers import Offer
from trigflow.serve.requests import FrameRequest, ImagesRequest, PictureRequest, bounded
from trigflow.serve.wire import encode


class Service:
    """Models with their queues and workers, limits, figures, and who may use them.

    Args:
        offers: the first one is what a request gets that names none.
        limits: see `Limits`.
        token: what clients must show; None for no such thing.
        origins: pages from elsewhere, such as `https://example.org`, that may open streams.

    Raises:
        UserError: for no offers or two of one name, and for a token or origins that are none.
    """

    def __init__(
        self, offers: Sequence[Offer], limits: Limits, token: str | None = None, origins: Sequence[str] = ()
    ) -> None:
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
        self.frame_request = bounded(FrameRequest, limits, offers)
        self.encoders = ThreadPoolExecutor(2, "trigflow-encoder")
        self.batchers = {offer.name: self._batcher(offer) for offer in offers}
        self.streams = 0

    def _batcher(self, offer: Offer) -> Batcher:
        def on_batch(pictures: int, seconds: float) -> None:
            self.metrics.images.labels(offer.name).inc(pictures)
            self.metrics.batch.labels(offer.name).observe(pictures)

        draws = [functools.partial(draw_together, drawer, NoiseSource(offer.model)) for drawer in offer.drawers]
        batcher = Batcher(draws, self.limits, on_batch)
        self.metrics.watch_queue(offer.name, lambda: batcher.waiting)
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

    def order(self, request: PictureRequest) -> tuple[str, Order]:
        """Name of the model and the order of a request.

        Raises:
            UserError: for numbers that this model does not take.
        """
        name = request.model or self.default
        return name, self.offers[name].order(**request.order())

    async def encode(self, name: str, drawn: Sequence[Drawn], format: str) -> tuple[bytes, dict[str, float]]:
        """Pictures of a model as bytes, and the seconds they were in the queue, in the network and here, which are recorded."""
        begun = time.monotonic()
        pictures = torch.cat([part.images for part in drawn])
        if format == "raw":  # sooner done than handed over
            content = encode(pictures, format)
        else:
            content = await asyncio.get_running_loop().run_in_executor(self.encoders, encode, pictures, format)
        seconds = {
            "queue": max(part.queue for part in drawn),
            "network": sum(part.network for part in drawn),
            "encode": time.monotonic() - begun,
        }
        self.metrics.observe(name, **seconds)
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

    Raises:
        UserError: unless it is a scheme and a host, and a port or none; `*` and `null` name no page.
    """
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
