"""The server on a real socket: clients that leave, stall or say nothing do not keep others waiting."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from serve.helpers import StubDrawer, running, stub_offer, wait_for
from trigflow.serve.app import create_app
from trigflow.serve.batching import Batcher
from trigflow.serve.limits import Limits
from trigflow.serve.server import Silent, StreamProtocol, http_protocol
from trigflow.serve.wire import unpack

LIMITS = Limits(connections=20, silent_seconds=1, send_seconds=1, frame_images=1024, message_bytes=1_000, body_bytes=1_000)


@pytest.fixture
def drawer() -> StubDrawer:
    return StubDrawer()


@pytest.fixture
def app(drawer: StubDrawer) -> FastAPI:
    return create_app([stub_offer(drawer, LIMITS)], LIMITS)


@pytest.fixture
def port(app: FastAPI, drawer: StubDrawer) -> Iterator[int]:
    with running(app) as port:
        yield port
        drawer.release()


@pytest.fixture(scope="module")
def lasting() -> Iterator[int]:
    """The port of a server that outlasts a test, for those that leave nothing behind."""
    with running(create_app([stub_offer(StubDrawer(), LIMITS)], LIMITS)) as port:
        yield port


@pytest.fixture
def batcher(app: FastAPI) -> Batcher:
    found: Batcher = app.state.service.batchers["student"]
    return found


def post(port: int, **asked: Any) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        content: bytes = answer.read()
        return content


def raw(port: int, head: str, body: bytes = b"") -> socket.socket:
    """A connection with the beginning of a request."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head.replace("\n", "\r\n").encode() + body)
    return connection


def status(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


def stream(port: int, **options: Any) -> contextlib.AbstractContextManager[ClientConnection]:
    return connect(f"ws://127.0.0.1:{port}/v1/stream", max_size=None, compression=None, **options)


POST = "POST /v1/images HTTP/1.1\nHost: x\nContent-Type: application/json\n"
UPGRADE = (
    "GET /v1/stream HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\n\n"
)


def test_images_and_frames(lasting: int) -> None:
    assert post(lasting, count=4).startswith(b"\x89PNG")
    with stream(lasting) as connection:
        for id in range(3):
            connection.send(json.dumps({"id": id, "count": 2, "taken": id - 1 if id else None}))
            header, content = unpack(bytes(connection.recv(10)))  # type: ignore[arg-type]
            assert header["id"] == id
            assert len(content) == 128


def test_work_of_a_client_that_left_is_dropped(port: int, batcher: Batcher, drawer: StubDrawer) -> None:
    drawer.hold()
    with raw(port, POST + "Content-Length: 2\n\n", b"{}"):
        drawer.wait_until_drawing()
        body = b'{"count": 40}'
        leaving = raw(port, POST + f"Content-Length: {len(body)}\n\n", body)
        wait_for(lambda: batcher.waiting == 40)
        leaving.close()
        wait_for(lambda: batcher.waiting == 0)
        drawer.release()
    assert post(port, count=2)
    assert [size for size, _ in drawer.batches] == [1, 2]


def test_silent_connections_give_way(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(60)]
    halfway = [raw(port, "GET /healthz HTTP/1.1\nHos") for _ in range(20)]
    begun = time.monotonic()
    assert post(port, count=1)
    with stream(port) as connection:
        connection.send('{"id": 1}')
        assert unpack(bytes(connection.recv(10)))[0]["id"] == 1  # type: ignore[arg-type]
        for one in silent + halfway:  # the first for lack of room, the last when their time is up
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            one.close()
        assert time.monotonic() - begun < 10
        connection.send('{"id": 2}')  # a stream is no silent connection
        assert unpack(bytes(connection.recv(10)))[0]["id"] == 2  # type: ignore[arg-type]


def test_a_body_that_does_not_come(lasting: int) -> None:
    with raw(lasting, POST + "Content-Length: 100\n\n", b"{") as connection:
        assert status(connection) == 408
    assert post(lasting)


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [
        (POST + "Content-Length: 1000000000000\n\n", b"", 413),
        (POST + f"Content-Length: {'9' * 30}\n\n", b"", 400),
        (POST + "Transfer-Encoding: chunked\n\n", b"7d0\r\n" + b" " * 2000 + b"\r\n", 413),
        (POST + "Content-Length: x\n\n", b"", 400),
        ("GET /" + "x" * 100_000 + " HTTP/1.1\n\n", b"", 400),
        ("nonsense\n\n", b"", 400),
    ],
)
def test_requests_that_are_too_large_or_none(lasting: int, head: str, body: bytes, expected: int) -> None:
    with raw(lasting, head, body) as connection:
        assert status(connection) == expected
    assert post(lasting)


def test_a_large_message_closes_its_stream_alone(lasting: int) -> None:
    with stream(lasting) as good, stream(lasting) as bad:
        bad.send("x" * 2_000)
        with pytest.raises(ConnectionClosed) as closed:
            bad.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        good.send('{"id": 1}')
        assert unpack(bytes(good.recv(10)))[0]["id"] == 1  # type: ignore[arg-type]


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """What uvicorn writes into its log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("uvicorn.error")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\x84\x00\x00\x00\x00\xff\xfe\xfd\xfc", 1007),  # text that is no UTF-8
        (b"\xf1\x80\x00\x00\x00\x00", 1002),  # reserved bits
        (b"\x83\x80\x00\x00\x00\x00", 1002),  # an opcode that does not exist
        (b"\x81\x02{}", 1002),  # not masked
        (b"\x80\x80\x00\x00\x00\x00", 1002),  # continues nothing
        (b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", 1009),  # a length of 2^64 - 1
        (b"\x81\xff\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x00", 1009),  # a length of 2^36
    ],
)
def test_malformed_frames(lasting: int, frame: bytes, code: int, said: list[logging.LogRecord]) -> None:
    with raw(lasting, UPGRADE) as connection:
        reader = connection.makefile("rb")
        assert reader.readline().split()[1] == b"101"
        while reader.readline().strip():
            pass
        connection.sendall(frame)
        answer = reader.read(4)
        assert answer[0] == 0x88  # a close frame
        assert int.from_bytes(answer[2:4], "big") == code
    assert post(lasting)
    assert [record.getMessage() for record in said if record.exc_info] == []


def test_a_slow_reader_is_given_up_and_others_are_served(port: int, app: FastAPI) -> None:
    service = app.state.service
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.settimeout(10)
    narrow.connect(("127.0.0.1", port))
    narrow.sendall(UPGRADE.replace("\n", "\r\n").encode())
    wait_for(lambda: service.streams == 1)
    asked = b'{"id": 1, "count": 1024}'
    drawn, end = 0, time.monotonic() + 30
    with narrow, stream(port) as good:
        wait_for(lambda: service.streams == 2)
        while service.streams == 2:
            with contextlib.suppress(OSError):  # asks on and on, and reads nothing
                narrow.sendall(bytes([0x81, 0x80 | len(asked), 0, 0, 0, 0]) + asked)
            good.send(json.dumps({"id": drawn}))
            assert unpack(bytes(good.recv(10)))[0]["id"] == drawn  # type: ignore[arg-type]
            drawn += 1
            assert time.monotonic() < end
    assert drawn > 10
    assert service.metrics.registry.get_sample_value("trigflow_closed_total", {"code": "1008"}) == 1
    assert post(port)


def test_a_shutdown_says_so(app: FastAPI) -> None:
    with running(app) as port, stream(port) as connection:
        connection.send('{"id": 1}')
        connection.recv(10)
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(10)
    assert closed.value.rcvd is None or closed.value.rcvd.code in (1000, 1001, 1012)


def test_room_is_made_by_closing_no_more_than_needed() -> None:
    """Of thirty connections that arrive before the loop can close any, the last twenty stay."""

    class Transport:
        closed = False

        def close(self) -> None:
            self.closed = True

        abort = close

    async def arrive() -> list[bool]:
        silent, transports = Silent(LIMITS), [Transport() for _ in range(30)]
        for count, transport in enumerate(transports, start=1):
            silent.watch(transport)  # type: ignore[arg-type]
            silent.make_room(count)
        return [transport.closed for transport in transports]

    assert asyncio.run(arrive()) == [True] * 10 + [False] * 20


def test_what_is_relied_on_in_uvicorn_is_there() -> None:
    """Its public API tells an application neither of connections that say nothing nor of frames that have left. So classes
    that it does not promise to keep are extended, and pyproject.toml bounds its version: raise the bound where this passes."""
    http, config = http_protocol(Silent(Limits())), uvicorn.Config(lambda: None)
    for extended, base in ((http, H11Protocol), (StreamProtocol, WebSocketsSansIOProtocol)):
        assert extended.__mro__[1] is base
        for name in [name for name, value in vars(extended).items() if inspect.isfunction(value)]:
            given, expected = (inspect.signature(getattr(kind, name)) for kind in (extended, base))
            assert given.parameters.keys() == expected.parameters.keys(), name

    async def check() -> None:
        state = uvicorn.server.ServerState()
        connection = http(config, state, {})
        assert connection.connections is state.connections
        assert connection.cycle is None
        assert connection.transport is None
        stream = StreamProtocol(config, state, {})
        assert isinstance(stream.writable, asyncio.Event)
        assert stream.writable.is_set()

    asyncio.run(check())
