"""Models, drawers and servers for the tests of the server."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from torch import Tensor

from training.tiny import digits_config, untrained_teacher
from trigflow.conditions import Conditioner, Text
from trigflow.models.model import Kind, Model
from trigflow.networks import TextConfig, build
from trigflow.samplers import Edit
from trigflow.serve.drawing import Mix
from trigflow.serve.limits import Limits
from trigflow.serve.listen import bind
from trigflow.serve.offers import Offer, offer_of
from trigflow.serve.server import make_server
from trigflow.training.config import origin_of


def teacher() -> Model:
    """A class-conditional diffusion model of 8x8 digits with random weights."""
    return untrained_teacher()


def student(**objective: Any) -> Model:
    """A consistency model with the same weights."""
    settings = {f"objective.{name}": value for name, value in objective.items()}
    config = digits_config({"objective.kind": "scd", "teacher": "teacher", **settings})
    return dataclasses.replace(untrained_teacher(), sampling=config.objective.sampling, origin=origin_of(config))


def plain() -> Model:
    """A consistency model without classes, with random weights."""
    model = student()
    spec = dataclasses.replace(model.spec, conditioning=dataclasses.replace(model.spec.conditioning, num_classes=0))
    with torch.random.fork_rng():
        network = build(spec, model.process.sigma_data).eval()
    return dataclasses.replace(model, network=network, spec=spec, conditioner=Conditioner())


def reader(kind: Kind = "consistency", length: int = 24, **objective: Any) -> Model:
    """A model of 8x8 pictures without classes that reads words of less than `length` bytes, with random weights."""
    model = student(**objective) if kind == "consistency" else teacher()
    words = TextConfig(length=length, width=16, depth=1, heads=2)
    takes = ("guidance",) if model.sampling.guidance_max > 1 else ()
    conditioning = dataclasses.replace(model.spec.conditioning, num_classes=0, text=words, takes=takes)
    spec = model.spec.changed(attention=(0,), conditioning=conditioning)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = build(spec, model.process.sigma_data)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.eval().requires_grad_(False)
    return dataclasses.replace(model, network=network, spec=spec, conditioner=Conditioner({"text": Text(length)}))


class StubDrawer:
    """Draws `64 noise + 128` and remembers its batches; while `hold` is set, it waits in the middle of a batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.mixes: list[Sequence[Mix] | None] = []
        self.fail = False
        self.begun = threading.Semaphore(0)
        self._go = threading.Event()
        self._go.set()

    def hold(self) -> None:
        """Let the next batch wait until `release`."""
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def wait_until_drawing(self) -> None:
        assert self.begun.acquire(timeout=10)

    def draw(
        self,
        noise: Callable[[int], Tensor],
        mixes: Sequence[Mix] | None,
        guidance: Tensor,
        steps: int,
        conditions: Mapping[str, Tensor] | None = None,
        *,
        weights: Sequence[float] = (1.0,),
        edit: Edit | None = None,
    ) -> Tensor:
        z = noise(0)
        self.batches.append((len(z), steps))
        self.mixes.append(mixes)
        self.begun.release()
        assert self._go.wait(10)
        if self.fail:
            raise RuntimeError("the drawer was told to fail")
        return (64 * z + 128).clamp(0, 255).to(torch.uint8)


def stub_offer(drawer: StubDrawer, limits: Limits | None = None) -> Offer:
    """An offer named `student`, drawn by a stub."""
    return offer_of(student(), limits or Limits(), drawer)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def running(app: FastAPI, port: int = 0) -> Iterator[int]:
    """The application at this port of 127.0.0.1, or at any that is free; gives the port."""
    with bind("127.0.0.1", port) as listener:
        server = make_server(app, log_level="critical")
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def pictures(client: TestClient, **asked: Any) -> Tensor:
    """Pictures of `POST /v1/images`, uint8 `(n, c, h, w)`."""
    answer = client.post("/v1/images", json={"format": "npy", "seed": 4, **asked})
    assert answer.status_code == 200, answer.text
    return torch.from_numpy(np.load(io.BytesIO(answer.content), allow_pickle=False))


def pixels(header: dict[str, Any], content: bytes) -> Tensor:
    """The pictures of a raw frame, uint8 of the header's shape."""
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).reshape(header["shape"])
