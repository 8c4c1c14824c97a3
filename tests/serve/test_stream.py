"""The WebSocket: newest request first, no frame before the last one was taken, a reason for every refusal."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from serve.helpers import StubDrawer, pixels, stub_offer, student, teacher, wait_for
from trigflow.runtime.errors import UserError
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of
from trigflow.serve.service import Service
from trigflow.serve.stream import PROTOCOL
from trigflow.serve.wire import pack, unpack

LIMITS = Limits(streams=2, frame_images=16, window_ms=0)
TOKEN = "a-token.of_enough~letters"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = create_app([offer_of(student(), LIMITS), offer_of(teacher(), LIMITS)], LIMITS)
    with TestClient(app) as client:
        yield client


@pytest.fixture
def drawer() -> StubDrawer:
    return StubDrawer()


@pytest.fixture
def stub(drawer: StubDrawer) -> Iterator[TestClient]:
    with TestClient(create_app([stub_offer(drawer, LIMITS)], LIMITS)) as client:
        yield client
        drawer.release()


def ask(stream: WebSocketTestSession, id: int, **asked: Any) -> None:
    stream.send_text(json.dumps({"id": id, **asked}))


def frame(stream: WebSocketTestSession) -> dict[str, Any]:
    header, content = unpack(stream.receive_bytes())
    return header | {"content": content}


def dropped(client: TestClient, reason: str) -> float:
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    return service.metrics.registry.get_sample_value("trigflow_dropped_total", {"reason": reason}) or 0.0


def test_frames(client: TestClient) -> None:
    with client.websocket_connect("/v1/stream") as stream:
        ask(stream, 5, count=3, seed=8)
        first = frame(stream)
        assert first["id"] == 5
        assert first["shape"] == [3, 1, 8, 8]
        assert first["format"] == "raw"
        assert set(first["ms"]) == {"queue", "network", "encode"}
        assert min(first["ms"].values()) >= 0
        assert torch.equal(pixels(first, first["content"]), student().sample(3, seed=8))
        ask(stream, 6, format="png", walk=[0.5, 0.5])
        second = frame(stream)
        assert second["content"].startswith(b"\x89PNG")
        ask(stream, 7, model="teacher", steps=2, guidance=2.0)
        third = frame(stream)
        assert torch.equal(pixels(third, third["content"]), teacher().sample(1, steps=2, guidance=2.0))


def test_a_walk_moves_the_picture_and_comes_back(client: TestClient) -> None:
    with client.websocket_connect("/v1/stream") as stream:
        pictures = []
        for id, walk in enumerate(([0, 0], [0.05, 0], [3, 1], [0, 0])):
            ask(stream, id, seed=1, walk=walk, labels={"3": 0.7, "5": 0.3})
            pictures.append(pixels(*unpack(stream.receive_bytes())).float())
        moved = [(picture - pictures[0]).abs().mean().item() for picture in pictures]
        assert moved[0] == moved[3] == 0
        assert 0 < moved[1] < moved[2]


def test_only_the_newest_request_is_drawn(stub: TestClient, drawer: StubDrawer) -> None:
    with stub.websocket_connect("/v1/stream") as stream:
        drawer.hold()
        ask(stream, 0)
        drawer.wait_until_drawing()
        for id in range(1, 6):
            ask(stream, id, seed=id)
        wait_for(lambda: dropped(stub, "newer request") == 4)
        drawer.release()
        assert [frame(stream)["id"] for _ in range(2)] == [0, 5]
    assert len(drawer.batches) == 2


def test_a_newer_request_keeps_the_place_in_the_queue(stub: TestClient, drawer: StubDrawer) -> None:
    batcher = stub.app.state.service.batchers["student"]  # type: ignore[attr-defined]
    with stub.websocket_connect("/v1/stream") as one, stub.websocket_connect("/v1/stream") as two:
        drawer.hold()
        ask(one, 0, count=3)
        drawer.wait_until_drawing()
        ask(two, 10)
        wait_for(lambda: batcher.waiting == 1)
        ask(two, 11, count=2)
        wait_for(lambda: batcher.waiting == 2)
        drawer.release()
        assert frame(one)["id"] == 0
        answered = frame(two)
        assert (answered["id"], answered["shape"][0]) == (11, 2)
    assert [size for size, _ in drawer.batches] == [3, 2]


def test_nothing_is_drawn_before_the_last_frame_was_taken(stub: TestClient, drawer: StubDrawer) -> None:
    with stub.websocket_connect("/v1/stream") as stream:
        ask(stream, 0, taken=None)
        assert frame(stream)["id"] == 0
        ask(stream, 1)
        ask(stream, 2)
        wait_for(lambda: dropped(stub, "newer request") == 1)  # both were read, and neither drawn
        assert len(drawer.batches) == 1
        stream.send_text('{"taken": 0}')
        assert frame(stream)["id"] == 2
        ask(stream, 3, taken=2)
        assert frame(stream)["id"] == 3
    assert len(drawer.batches) == 3


def test_a_client_that_leaves_leaves_no_work(stub: TestClient, drawer: StubDrawer) -> None:
    batcher = stub.app.state.service.batchers["student"]  # type: ignore[attr-defined]
    with stub.websocket_connect("/v1/stream") as stays:
        drawer.hold()
        ask(stays, 0)
        drawer.wait_until_drawing()
        with stub.websocket_connect("/v1/stream") as leaves:
            ask(leaves, 1, count=4)
            wait_for(lambda: batcher.waiting == 4)
        wait_for(lambda: batcher.waiting == 0)
        assert dropped(stub, "client left") == 1
        drawer.release()
        assert frame(stays)["id"] == 0
    assert [size for size, _ in drawer.batches] == [1]


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        ("{", 1007, "no JSON"),
        ("", 1007, "no JSON"),
        ("null", 1007, "the request"),
        ("[" * 4000, 1007, "no JSON"),
        ('{"count": 1}', 1007, "taken"),
        ('{"id": -1}', 1007, "id"),
        ('{"id": "x"}', 1007, "id"),
        ('{"id": 1, "count": 17}', 1007, "count"),
        ('{"id": 1, "guidance": NaN}', 1007, "no JSON"),
        ('{"id": 1, "guidance": 9}', 1007, "guidance 9 for the student"),
        ('{"id": 1, "labels": {"10": 1}}', 1007, "labels"),
        ('{"id": 1, "labels": 10}', 1007, "label 10 is out of range; expected 0 to 9"),
        ('{"id": 1, "walk": [1e999, 0]}', 1007, "walk"),
        ('{"id": 1, "walk": "north"}', 1007, "walk"),
        ('{"id": 1, "model": "../teacher"}', 1007, "model"),
        ('{"id": 1, "format": "npy"}', 1007, "format"),
        ('{"id": 1, "colour": "red"}', 1007, "colour"),
        ('{"id": 1, "seed": "' + "x" * 5000 + '"}', 1007, "a message of"),
        (b"\x00\x01", 1003, "a binary message"),
    ],
)
def test_malformed_messages(client: TestClient, message: str | bytes, code: int, reason: str) -> None:
    with client.websocket_connect("/v1/stream") as bad, client.websocket_connect("/v1/stream") as good:
        bad.send_text(message) if isinstance(message, str) else bad.send_bytes(message)
        with pytest.raises(WebSocketDisconnect) as closed:
            bad.receive_bytes()
        assert closed.value.code == code
        assert closed.value.reason.startswith(reason)
        assert len(closed.value.reason.encode()) <= 123
        ask(good, 1)  # the others are served on
        assert frame(good)["id"] == 1


def test_a_frame_that_cannot_be_drawn_ends_the_stream_alone(
    stub: TestClient, drawer: StubDrawer, caplog: pytest.LogCaptureFixture
) -> None:
    """And the server's log says why."""
    caplog.set_level(logging.ERROR, "uvicorn.error")
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    with stub.websocket_connect("/v1/stream") as stream:
        drawer.fail = True
        ask(stream, 0)
        with pytest.raises(WebSocketDisconnect) as closed:
            stream.receive_bytes()
        assert closed.value.code == 1011
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert "the drawer was told to fail" in str([record.exc_info for record in caplog.records])
    drawer.fail = False
    with stub.websocket_connect("/v1/stream") as stream:
        ask(stream, 1)
        assert frame(stream)["id"] == 1


def test_a_frame_that_waits_too_long_ends_the_stream() -> None:
    drawer, limits = StubDrawer(), Limits()
    with TestClient(create_app([stub_offer(drawer, limits)], limits)) as client:
        batcher = client.app.state.service.batchers["student"]  # type: ignore[attr-defined]
        with client.websocket_connect("/v1/stream") as one, client.websocket_connect("/v1/stream") as two:
            drawer.hold()
            ask(one, 1)
            drawer.wait_until_drawing()
            ask(two, 1)
            wait_for(lambda: batcher.waiting == 1)
            batcher._waiting[0].entered -= limits.queue_seconds
            drawer.release()
            assert frame(one)["id"] == 1
            with pytest.raises(WebSocketDisconnect) as closed:
                two.receive_bytes()
            assert closed.value.code == 1013
            assert closed.value.reason.startswith("busy")
            ask(one, 2)
            assert frame(one)["id"] == 2


def test_an_idle_stream_is_closed() -> None:
    limits = Limits(stream_idle_seconds=0.05)
    with TestClient(create_app([stub_offer(StubDrawer(), limits)], limits)) as client:
        with client.websocket_connect("/v1/stream") as stream, pytest.raises(WebSocketDisconnect) as closed:
            stream.receive_bytes()
        assert closed.value.code == 1008
        assert closed.value.reason.startswith("idle")


def test_no_more_streams_than_allowed(client: TestClient) -> None:
    with client.websocket_connect("/v1/stream"), client.websocket_connect("/v1/stream"):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/v1/stream"):
            pass
        assert refused.value.status_code == 429
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    wait_for(lambda: service.streams == 0)
    with client.websocket_connect("/v1/stream") as stream:
        ask(stream, 1)
        assert frame(stream)["id"] == 1


def test_token_as_header_or_subprotocol() -> None:
    with TestClient(create_app([stub_offer(StubDrawer())], token=TOKEN)) as client:
        for headers, subprotocols in (
            ({}, []),
            ({"authorization": "Bearer wrong"}, []),
            ({}, [PROTOCOL, "bearer.wrong"]),
            ({}, [TOKEN]),
        ):
            with (
                pytest.raises(WebSocketDenialResponse) as refused,
                client.websocket_connect("/v1/stream", headers=headers, subprotocols=subprotocols),
            ):
                pass
            assert refused.value.status_code == 401
        for headers, subprotocols in (({"authorization": f"Bearer {TOKEN}"}, []), ({}, [PROTOCOL, f"bearer.{TOKEN}"])):
            with client.websocket_connect("/v1/stream", headers=headers, subprotocols=subprotocols) as stream:
                ask(stream, 1)
                assert frame(stream)["id"] == 1
                assert stream.accepted_subprotocol == (PROTOCOL if subprotocols else None)


def test_pages_of_other_origins_are_refused() -> None:
    app = create_app([stub_offer(StubDrawer())], origins=["https://friend.example"])
    with TestClient(app) as client:
        for origin in ("https://evil.example", "null", "http://testserver.evil.example", "http://[::1", "testserver", ""):
            with (
                pytest.raises(WebSocketDenialResponse) as refused,
                client.websocket_connect("/v1/stream", headers={"origin": origin}),
            ):
                pass
            assert refused.value.status_code == 403
        for origin in ("http://testserver", "https://friend.example"):
            with client.websocket_connect("/v1/stream", headers={"origin": origin}) as stream:
                ask(stream, 1)
                assert frame(stream)["id"] == 1


@pytest.mark.parametrize(
    ("origin", "host", "welcome"),
    [
        ("http://127.0.0.1:8767", "127.0.0.1:8767", True),
        ("http://localhost:8767", "LOCALHOST:8767", True),
        ("http://LOCALHOST:8767", "localhost:8767", True),
        ("http://localhost", "localhost:80", True),
        ("http://localhost:80", "localhost", True),
        ("https://localhost", "localhost:443", True),
        ("https://localhost:443", "localhost", True),
        ("http://[::1]:8767", "[::1]:8767", True),
        ("http://localhost:8767", "localhost", False),
        ("http://localhost", "localhost:443", False),
        ("https://localhost", "localhost:80", False),
        ("http://localhost:8767", "localhost:8768", False),
        ("https://evil.org", "localhost:8767", False),
        ("http://localhost.evil.org:8767", "localhost:8767", False),
        ("http://localhost:8767@evil.org", "localhost:8767", False),
        ("http://none", None, False),
        ("http://", "", False),
        ("https://example.org", "localhost:8767", True),
        ("https://EXAMPLE.org:443", "localhost:8767", True),
        ("http://example.org", "localhost:8767", False),
        ("https://example.org:8443", "localhost:8767", False),
        ("http://xn--bcher-kva.example:3000", "localhost:8767", True),
        (None, "localhost:8767", True),
    ],
)
def test_origin_and_host_are_compared_in_one_form(origin: str | None, host: str | None, welcome: bool) -> None:
    for named in (
        ["https://example.org", "http://bücher.example:3000"],
        ["https://EXAMPLE.org:443/", "HTTP://Bücher.example:3000/"],
    ):
        assert Service([stub_offer(StubDrawer())], Limits(), origins=named).welcomes(origin, host) == welcome


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "",
        "example.org",
        "example.org:443",
        "//example.org",
        "https://",
        "https://example.org/page",
        "https:/example.org",
        "https://example.org?a",
        "https://example.org#a",
        "https://me@example.org",
        "https://example.org:port",
        "https://a b.org",
        "https://example.org:99999",
        "https://example.org//",
        "https://a..b",
        " https://example.org",
        "https://[::1",
    ],
)
def test_origins_that_are_none_are_refused_at_once(origin: str) -> None:
    with pytest.raises(UserError, match=r"^origin '.*'; expected scheme and host of a page, .*; correct --origins$"):
        create_app([stub_offer(StubDrawer())], origins=[origin])


def test_one_origin_is_no_list_of_letters() -> None:
    service = Service([stub_offer(StubDrawer())], Limits(), origins="https://example.org")
    assert service.origins == {"https://example.org"}


def test_a_frame_unpacks_to_what_was_packed() -> None:
    header = {"id": 2**53 - 1, "shape": [2, 1, 1, 2]}
    packed = pack(header, b"\x01\x02\x03\x04")
    assert packed[:4] == len(json.dumps(header, separators=(",", ":"))).to_bytes(4, "little")
    assert unpack(packed) == (header, b"\x01\x02\x03\x04")
    assert pixels(*unpack(packed)).tolist() == [[[[1, 2]]], [[[3, 4]]]]
