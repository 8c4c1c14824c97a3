"""Many clients of all kinds at once: nobody sees a server error, and nothing of them is left when they are gone."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.websockets import WebSocket
from torch import Tensor

from serve.crowd import Tally, crowd
from serve.helpers import running, student, teacher, wait_for
from trigflow.deploy import Engine
from trigflow.deploy.traced import KEPT_BYTES, Kept, Traced
from trigflow.models.model import Model
from trigflow.serve.app import create_app
from trigflow.serve.batching import Job
from trigflow.serve.drawing import ModelDrawer
from trigflow.serve.limits import Limits
from trigflow.serve.offers import Offer, offer_of
from trigflow.serve.server import StreamProtocol
from trigflow.serve.service import Service
from trigflow.serve.stream import Stream, Wanted

LIMITS = Limits(batch=16, queue=128, connections=60, streams=24, silent_seconds=1, send_seconds=0.5, queue_seconds=5)
CLIENTS, SECONDS, WORKERS = 60, 2, 2
OF_A_CLIENT = (Job, Stream, Wanted, Request, WebSocket, StreamProtocol)


def settled_offer(model: Model) -> Offer:
    """As `trigflow serve` has it: recorded beforehand."""
    engines = [Engine(model, steps=1, variant="traced") for _ in range(WORKERS)]
    for engine in engines:
        engine.settle(LIMITS.batch)
    return offer_of(model, LIMITS, *[ModelDrawer(engine.model) for engine in engines])


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app([settled_offer(student()), settled_offer(teacher())], LIMITS)


def left(service: Service) -> Counter[str]:
    """How many objects of clients and tensors are alive, beside what the server keeps on purpose."""
    for name, offer in service.offers.items():
        for network in networks_of(offer):
            network.kept = Kept(KEPT_BYTES)
        draws: Any = service.batchers[name]._draws
        for draw in draws:
            draw.args[1].__init__(offer.model)  # its noises
    gc.collect()
    kinds = (*OF_A_CLIENT, asyncio.Task, Tensor)
    return Counter(type(found).__name__ for found in gc.get_objects() if type(found) in kinds)


def test_a_crowd_leaves_nothing_behind(app: FastAPI) -> None:
    service: Service = app.state.service
    recorded = shapes_recorded(service)
    with running(app) as port:
        resting = left(service)
        tallies: list[Tally] = []
        for _ in range(2):
            tallies.append(asyncio.run(crowd(port, CLIENTS, SECONDS)))
            wait_for(lambda: service.streams == 0)
            wait_for(lambda: sum(batcher.waiting for batcher in service.batchers.values()) == 0)
            settle(lambda: left(service) == resting)
            assert left(service) == resting
        assert service.healthy
    for tally in tallies:
        assert tally.statuses("poster") <= {200, 429, "Gone"}  # a connection that was silent gave way
        assert tally.statuses("viewer") <= {"left", 429, 1013, "Gone"}
        assert tally.statuses("vandal", "garbler") <= {"refused", 429, "Gone"}
        assert tally.images > 0
        assert tally.frames > 0
        assert max(tally.queue) <= 1000 * LIMITS.queue_seconds
    sample = service.metrics.registry.get_sample_value
    statuses = {labels["status"] for labels in requests(service)}
    assert not {status for status in statuses if status.startswith("5")}
    assert {"200", "404", "405", "413", "415", "422"} <= statuses
    assert sample("trigflow_streams") == 0
    assert shapes_recorded(service) == recorded, "recorded later"


def settle(condition: Callable[[], bool]) -> None:
    """Give it time to become true."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)


def networks_of(offer: Offer) -> list[Traced]:
    networks = [drawer.model.network for drawer in offer.drawers]  # type: ignore[attr-defined]
    assert all(isinstance(network, Traced) for network in networks)
    return networks


def shapes_recorded(service: Service) -> list[set[Any]]:
    return [set(network.recorded) for offer in service.offers.values() for network in networks_of(offer)]


def requests(service: Service) -> list[dict[str, str]]:
    """Labels of the counter of requests."""
    return [
        sample.labels
        for metric in service.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "trigflow_requests_total"
    ]
