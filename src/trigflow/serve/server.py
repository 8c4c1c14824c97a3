"""The application on a socket: uvicorn, with a bound on connections that say nothing."""

import asyncio
import logging
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from trigflow.serve.limits import Limits
from trigflow.serve.service import Service

MOST_PONGS = 1000
"""Answers to pings that may wait until a client takes them; beyond it the stream is cut off."""


class Silent:
    """HTTP connections that wait for a request, the one that has waited longest first, and those that do not take an answer."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._timers: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._stalled: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Transport] = set()

    def watch(self, transport: asyncio.Transport) -> None:
        """Close this connection unless it says what it wants in time, or others need its place before."""
        if transport not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[transport] = loop.call_later(self.limits.silent_seconds, self._end, transport)

    def release(self, transport: asyncio.Transport) -> None:
        """The connection has made its request."""
        timer = self._timers.pop(transport, None)
        if timer is not None:
            timer.cancel()

    def forget(self, transport: asyncio.Transport) -> None:
        """The connection is gone, or a stream now."""
        self.release(transport)
        self.taken(transport)
        self._closing.discard(transport)

    def stalled(self, transport: asyncio.Transport) -> None:
        """There is more to send than the client takes: cut it off unless it takes some of it in time."""
        self.taken(transport)
        left = transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._stalled[transport] = loop.call_later(self.limits.send_seconds, self._check, transport, left)

    def taken(self, transport: asyncio.Transport) -> None:
        """The client has taken what there was to send."""
        timer = self._stalled.pop(transport, None)
        if timer is not None:
            timer.cancel()

    def _check(self, transport: asyncio.Transport, left: int) -> None:
        if transport.get_write_buffer_size() < left:
            self.stalled(transport)
        else:
            transport.abort()

    def _end(self, transport: asyncio.Transport) -> None:
        """Close a connection that was silent for too long, unless it still takes its last answer."""
        if transport in self._stalled:
            self.release(transport)
            self.watch(transport)
        else:
            self._close(transport)

    def make_room(self, connections: int) -> None:
        """Close those that have been silent longest, so that of this many at most `limits.connections` stay open."""
        open_ = connections - len(self._closing)  # those that are being closed are still counted as connections
        for transport in list(self._timers)[: max(0, open_ - self.limits.connections)]:
            self._close(transport)

    def _close(self, transport: asyncio.Transport) -> None:
        self.release(transport)
        self._closing.add(transport)
        transport.close()  # what is left of an answer may still be taken, for a while
        asyncio.get_running_loop().call_later(self.limits.send_seconds, transport.abort)


def http_protocol(silent: Silent) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, which tells `silent` about its connections."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            silent.watch(transport)
            silent.make_room(sum(isinstance(one, Protocol) for one in self.connections))

        def connection_lost(self, exc: Exception | None) -> None:
            silent.forget(self.transport)
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                silent.release(self.transport)

        def handle_websocket_upgrade(self, event: Any) -> None:
            silent.forget(self.transport)
            super().handle_websocket_upgrade(event)

        def pause_writing(self) -> None:
            super().pause_writing()
            silent.stalled(self.transport)

        def resume_writing(self) -> None:
            super().resume_writing()
            silent.taken(self.transport)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
                silent.watch(self.transport)

    return Protocol


class StreamProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, which lets the application wait until a frame has left, and give a client up."""

    pongs = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.pongs = 0

    def handle_ping(self) -> None:
        super().handle_ping()
        self.pongs += not self.writable.is_set()
        if self.pongs > MOST_PONGS:
            self.transport.abort()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        scope: dict[str, Any] | None = getattr(self, "scope", None)  # type: ignore[assignment]
        if scope is not None:
            scope["extensions"]["trigflow.flow"] = {"sent": self.writable.wait, "abort": self.transport.abort}


def make_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, *, log_level: str = "warning") -> uvicorn.Server:
    """A uvicorn server for the application of `create_app`; `run()` serves until it is interrupted."""
    service: Service = app.state.service
    limits = service.limits
    config = uvicorn.Config(
        app,
        host,
        port,
        http=http_protocol(Silent(limits)),
        ws=StreamProtocol,
        ws_max_size=limits.message_bytes,
        ws_per_message_deflate=False,
        timeout_keep_alive=max(1, round(limits.silent_seconds)),
        timeout_graceful_shutdown=5,
        log_level=log_level,
        access_log=log_level == "info",
        server_header=False,
        proxy_headers=False,
    )
    logging.getLogger("uvicorn.error").addFilter(without_traceback)
    return uvicorn.Server(config)


def without_traceback(record: logging.LogRecord) -> bool:
    """Leave a client's mistake, text that is no UTF-8, in the log as a line."""
    if record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError):
        record.exc_info = None
    return True
