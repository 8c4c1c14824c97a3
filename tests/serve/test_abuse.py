"""Clients that take nothing of what they ask for do not keep what was made for them alive."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from websockets.sync.client import connect

from serve.helpers import StubDrawer, running, stub_offer, wait_for
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.server import StreamProtocol
from trigflow.serve.wire import unpack

LIMITS = Limits(images=1024, batch=1024, connections=4, streams=8, send_seconds=0.3, silent_seconds=60, window_ms=0)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(create_app([stub_offer(StubDrawer(), LIMITS)], LIMITS)) as port:
        yield port


UPGRADE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def request(**asked: Any) -> bytes:
    body = json.dumps(asked).encode()
    head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def narrow(port: int) -> socket.socket:
    """A connection that takes little at a time."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(10)
    made.connect(("127.0.0.1", port))
    return made


def connection_of(kind: type, client: socket.socket) -> asyncio.Transport:
    """The server's side of this client's connection."""

    def found() -> list[Any]:
        protocols = [one for one in gc.get_objects() if issubclass(type(one), kind)]
        return [one.transport for one in protocols if one.client == client.getsockname()]

    wait_for(lambda: bool(found()))
    transport: asyncio.Transport = found()[0]
    return transport


def test_answers_that_nobody_takes(port: int) -> None:
    """Requests one behind the other for far more than fits into the buffers on the way."""
    with narrow(port) as greedy:
        connection = connection_of(H11Protocol, greedy)
        with contextlib.suppress(OSError):
            greedy.sendall(request(count=1024, format="npy") * 200)
        wait_for(connection.is_closing, 20)


def test_an_answer_that_is_taken_slowly_arrives_whole(port: int) -> None:
    with narrow(port) as slow:
        slow.sendall(request(count=1024, format="npy") + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        taken = b""
        while part := slow.recv(1 << 14):
            taken += part
        assert taken.count(b"HTTP/1.1 200") == 2
        assert len(taken) > 1 << 16


def test_an_answer_that_is_taken_without_a_pause_arrives_whole() -> None:
    """However long that takes: here longer than a connection may be silent, and then be closing."""
    count = 1 << 18
    limits = Limits(images=count, batch=count, silent_seconds=0.2, send_seconds=2, window_ms=0)
    with running(create_app([stub_offer(StubDrawer(), limits)], limits)) as port, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        slow.settimeout(10)
        slow.connect(("127.0.0.1", port))
        slow.sendall(request(count=count, format="npy"))
        taken = 0
        while taken < count * 64 and (part := slow.recv(1 << 16)):
            taken += len(part)
            time.sleep(0.012)
        assert taken > count * 64


def test_a_stream_that_ends_with_a_frame_that_nobody_takes() -> None:
    limits = Limits(frame_images=8192, send_seconds=2, window_ms=0)
    with running(create_app([stub_offer(StubDrawer(), limits)], limits)) as port, narrow(port) as client:
        client.sendall(UPGRADE)
        connection = connection_of(StreamProtocol, client)
        asked = b'{"id": 1, "count": 8192}'
        while not connection.get_write_buffer_size():
            client.sendall(bytes([0x81, 0x80 | len(asked), 0, 0, 0, 0]) + asked)
            time.sleep(0.1)
        client.sendall(b"\x88\x80" + bytes(4))  # closes, and reads nothing
        wait_for(connection.is_closing)
        wait_for(lambda: not connection.get_write_buffer_size())


def test_pings_whose_answers_nobody_takes(port: int) -> None:
    with narrow(port) as noisy:
        noisy.sendall(UPGRADE)
        connection = connection_of(StreamProtocol, noisy)
        ping = b"\x89\xfd" + bytes(4) + bytes(125)
        with contextlib.suppress(OSError):  # reset, or a broken pipe
            for _ in range(1000):
                noisy.sendall(ping * 200)
        wait_for(connection.is_closing)


def test_streams_take_no_place_of_requests(port: int) -> None:
    """Twice as many streams as HTTP connections are allowed, and a connection that has said nothing stays."""
    with contextlib.ExitStack() as open_:
        waiting = open_.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        streams = [open_.enter_context(connect(f"ws://127.0.0.1:{port}/v1/stream")) for _ in range(8)]
        waiting.sendall(request(count=1))
        assert waiting.recv(12) == b"HTTP/1.1 200"
        for stream in streams:
            stream.send('{"id": 1}')
            assert unpack(stream.recv(10, decode=False))[0]["id"] == 1
