"""Clients of every kind, well-behaved or not, for the soak test and the benchmark of the server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus

from trigflow.serve.wire import unpack

Outcome = int | str
"""A status, a close code, or in words how a connection ended."""


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        outcomes: by kind of client and outcome, how often.
        queue: milliseconds that answered requests and frames waited in the queue.
        frames, images: how many came.
    """

    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    queue: list[float] = field(default_factory=list)
    frames: int = 0
    images: int = 0

    def statuses(self, *kinds: str) -> set[Outcome]:
        """The outcomes of these kinds of clients, or of all."""
        return {outcome for kind, outcome in self.outcomes if not kinds or kind in kinds}


@dataclass
class Client:
    """What a client has: a server, choices of its own, a tally that all share, and the time to stop."""

    port: int
    chosen: random.Random
    tally: Tally
    end: float

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    def saw(self, outcome: Outcome, kind: str) -> None:
        self.tally.outcomes[kind, outcome] += 1


Kind = Callable[[Client], Awaitable[None]]


async def crowd(port: int, clients: int, seconds: float) -> Tally:
    """Let this many clients, of all kinds in turn, go at a server of 127.0.0.1 for this time."""
    tally, end = Tally(), time.monotonic() + seconds

    async def one(number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        client = Client(port, random.Random(number), tally, end)
        while not client.over:
            try:
                await kind(client)
            except (OSError, EOFError, ConnectionClosed, InvalidHandshake) as error:
                client.saw(type(error).__name__, kind.__name__)
            await asyncio.sleep(0.2)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return tally


# HTTP ----------------------------------------------------------------------------------------------------------------


def post(body: bytes, **headers: object) -> bytes:
    """The bytes of `POST /v1/images`."""
    given = {"Host": "x", "Content-Type": "application/json", "Content-Length": len(body)} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST /v1/images HTTP/1.1\r\n{head}\r\n".encode() + body


class Gone(EOFError):
    """The server has closed the connection before the answer began."""


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        if getattr(error, "partial", b""):
            raise
        raise Gone from None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def any_request(chosen: random.Random) -> dict[str, Any]:
    """A request for images that a student of digits with its teacher takes."""
    asked = {
        "seed": chosen.randrange(1000),
        "count": chosen.choice((1, 1, 2, 3, 5, 8, 16, 33, 64)),
        "labels": chosen.choice((None, 3, [1, 2, 3], {"3": 0.7, "5": 0.3}, {str(c): 1.0 for c in range(4)})),
        "format": chosen.choice(("png", "webp", "npy")),
        "steps": chosen.choice((1, 2, 2, 2, 4)),
        "walk": [chosen.uniform(-9, 9), chosen.uniform(-9, 9)] if chosen.random() < 0.5 else [0, 0],
    }
    if chosen.random() < 0.1:
        asked |= {"model": "teacher", "guidance": chosen.choice((1.0, 2.0)), "count": min(4, asked["count"])}
    return asked


SIGNS = {"png": b"\x89PNG", "webp": b"RIFF", "npy": b"\x93NUMPY"}


async def poster(client: Client) -> None:
    """Asks for images of all formats, again and again on one connection, and on another when that was closed because it was
    silent meanwhile; rests when told to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        for _ in range(client.chosen.randrange(1, 20)):
            if client.over:
                return
            asked = any_request(client.chosen)
            writer.write(post(json.dumps(asked).encode()))
            status, headers, body = await answer(reader)
            client.saw(status, "poster")
            if status == 200:
                assert body.startswith(SIGNS[asked["format"]])
                client.tally.images += asked["count"]
                client.tally.queue.append(float(headers["server-timing"].split("queue;dur=")[1].split(",")[0]))
            if status == 429:
                await asyncio.sleep(min(float(headers["retry-after"]), max(0.0, client.end - time.monotonic())))
    finally:
        await close(writer)


async def leaver(client: Client) -> None:
    """Asks for images and leaves without them."""
    _, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        writer.write(post(b'{"count": 8}'))
        await writer.drain()
        await asyncio.sleep(client.chosen.choice((0.0, 0.03, 0.3)))
        client.saw("left", "leaver")
    finally:
        writer.transport.abort()


BAD_REQUESTS = (
    (b"nonsense\r\n\r\n", 400),
    (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 400),
    (b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    (b"DELETE /v1/images HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    (post(b"{}", Content_Type="text/plain"), 415),
    (post(b"", Content_Length=10**12), 413),
    (post(b"{"), 422),
    (post(b"[" * 1000), 422),
    (post(b'{"count": 1e9}'), 422),
    (post(b'{"count": -1}'), 422),
    (post(b'{"guidance": NaN}'), 422),
    (post(b'{"guidance": 1e400}'), 422),
    (post(b'{"labels": 10}'), 422),
    (post(b'{"labels": {"3": NaN}}'), 422),
    (post(b'{"model": "../../teacher"}'), 422),
    (post(b'{"seed": ' + b"9" * 400 + b"}"), 422),
)


async def vandal(client: Client) -> None:
    """Sends what is no request; each must be answered as `BAD_REQUESTS` says."""
    for sent, expected in client.chosen.sample(BAD_REQUESTS, 4):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        try:
            writer.write(sent)
            status, _, _ = await answer(reader)
            client.saw(status if status != expected else "refused", "vandal")
        finally:
            await close(writer)


async def mute(client: Client) -> None:
    """Says nothing, or half of something, until it is sent away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        writer.write(client.chosen.choice((b"", b"GET /healthz HTTP/1.1\r\nHos", post(b"{}", Content_Length=9))))
        with contextlib.suppress(asyncio.TimeoutError):
            said = await asyncio.wait_for(reader.read(), max(0.1, client.end - time.monotonic()))
            client.saw("408" if b" 408 " in said else "sent away", "mute")
    finally:
        await close(writer)


# Streams -------------------------------------------------------------------------------------------------------------


async def viewer(client: Client) -> None:
    """Walks through noise, asking for the next frame when it has the last, and now and then for two at once."""
    chosen, tally = client.chosen, client.tally
    try:
        async with connect(f"ws://127.0.0.1:{client.port}/v1/stream", compression=None, max_size=None) as stream:
            asked, taken = itertools.count(), None
            for _ in range(chosen.randrange(5, 60)):
                if client.over:
                    break
                for _ in range(chosen.choice((1, 1, 2))):
                    wanted = {
                        "id": next(asked),
                        "taken": taken,
                        "count": chosen.choice((1, 1, 1, 4, 16)),
                        "walk": [chosen.uniform(-9, 9), 0.1 * (taken or 0)],
                        "labels": chosen.choice((None, 7, {"1": 0.5, "8": 0.5})),
                        "format": chosen.choice(("raw", "raw", "png", "webp")),
                        "steps": chosen.choice((1, 2, 2, 4)),
                    }
                    await stream.send(json.dumps(wanted))
                header, content = unpack(await stream.recv(decode=False))
                assert content
                assert taken is None or header["id"] > taken
                taken = header["id"]
                while taken < wanted["id"]:  # the first of two was drawn before the second came
                    await stream.send(json.dumps({"taken": taken}))
                    header, content = unpack(await stream.recv(decode=False))
                    taken = header["id"]
                tally.frames += 1
                tally.queue.append(header["ms"]["queue"])
        client.saw("left", "viewer")
    except InvalidStatus as refused:
        client.saw(refused.response.status_code, "viewer")
    except InvalidMessage:
        client.saw("Gone", "viewer")
    except ConnectionClosed as closed:
        client.saw(closed.rcvd.code if closed.rcvd else "lost", "viewer")


UPGRADE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def frame(text: bytes) -> bytes:
    """A message of a client, shorter than 126 bytes, masked with zeros."""
    return bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text


async def sloth(client: Client) -> None:
    """Opens a stream, asks for frames, and reads none of them; then leaves."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", client.port))
        _, writer = await asyncio.open_connection(sock=narrow, limit=1024)
    except BaseException:
        narrow.close()
        raise
    try:
        writer.write(UPGRADE)
        for id in range(client.chosen.randrange(5, 50)):
            if client.over or writer.is_closing():
                break
            writer.write(frame(b'{"id": %d, "count": 4}' % id))
            await asyncio.sleep(0.2)
        client.saw("left", "sloth")
    finally:
        writer.transport.abort()


BAD_FRAMES = (
    (frame(b"{"), 1007),
    (frame(b'{"id": 1, "count": 100000}'), 1007),
    (frame(b'{"id": 1, "guidance": NaN}'), 1007),
    (frame(b'{"id": 1, "model": "../x"}'), 1007),
    (b"\x82\x81\x00\x00\x00\x00\x00", 1003),  # binary
    (b"\x81\x84\x00\x00\x00\x00\xff\xfe\xfd\xfc", 1007),  # text that is no UTF-8
    (b"\xf1\x80\x00\x00\x00\x00", 1002),  # reserved bits
    (b"\x83\x80\x00\x00\x00\x00", 1002),  # an opcode that does not exist
    (b"\x81\x02{}", 1002),  # not masked
    (b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", 1009),  # a length of 2^64 - 1
)


async def garbler(client: Client) -> None:
    """Opens streams and sends broken frames; each must close its stream with the code of `BAD_FRAMES`."""
    for sent, expected in client.chosen.sample(BAD_FRAMES, 3):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        try:
            writer.write(UPGRADE)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 101 " not in head:
                client.saw(int(head.split()[1]), "garbler")
                continue
            writer.write(sent)
            closing = await reader.readexactly(4)
            code = int.from_bytes(closing[2:], "big")
            client.saw("refused" if (closing[0], code) == (0x88, expected) else code, "garbler")
        finally:
            await close(writer)


async def deserter(client: Client) -> None:
    """Opens a stream, asks for a frame, and is gone without a word."""
    _, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        writer.write(UPGRADE + frame(b'{"id": 1, "count": 4}'))
        await asyncio.sleep(client.chosen.choice((0.0, 0.03, 0.3)))
        client.saw("left", "deserter")
    finally:
        writer.transport.abort()


KINDS: tuple[Kind, ...] = (
    *(poster, viewer, vandal, poster, mute),
    *(viewer, poster, leaver, sloth, poster),
    *(viewer, garbler, poster, deserter, viewer),
)
