"""`/v1/stream`: frames as fast as they are taken, always of the newest request."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from trigflow.runtime.errors import UserError
from trigflow.serve.batching import BusyError, ClosedError, Drawn, Job
from trigflow.serve.drawing import Order
from trigflow.serve.requests import FrameRequest, Taken, check, parse_json
from trigflow.serve.service import Service, within
from trigflow.serve.wire import columns_of, pack

PROTOCOL = "trigflow.v1"
"""Subprotocol that a client must offer if it sends its token as another one."""
TOKEN_PREFIX = "bearer."

# Close codes, RFC 6455.
UNSUPPORTED, INVALID, POLICY, FAILED, BUSY = 1003, 1007, 1008, 1011, 1013


class Closed(Exception):
    """The server closes the stream with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Wanted:
    """A request with its model and order."""

    request: FrameRequest
    model: str
    order: Order


async def serve_stream(websocket: WebSocket, service: Service) -> None:
    """Let a client in, or tell it why not; then serve it until one side closes."""
    refusal = _refusal(websocket, service)
    if refusal is not None:
        status, detail = refusal
        await websocket.send_denial_response(JSONResponse({"detail": detail}, status))
        return
    offered = websocket.scope.get("subprotocols", [])
    service.streams += 1
    service.metrics.streams.set(service.streams)
    try:
        await websocket.accept(PROTOCOL if PROTOCOL in offered else None)
        await Stream(websocket, service).run()
    finally:
        service.streams -= 1
        service.metrics.streams.set(service.streams)
        if (flow := flow_of(websocket)) is not None:  # what is left of a frame may still be taken, for a while
            asyncio.get_running_loop().call_later(service.limits.send_seconds, flow["abort"])


def flow_of(websocket: WebSocket) -> dict[str, Any] | None:
    """What `StreamProtocol` lets a stream do, by name, where it is the one that serves."""
    return websocket.scope.get("extensions", {}).get("trigflow.flow")


def _refusal(websocket: WebSocket, service: Service) -> tuple[int, str] | None:
    headers = websocket.headers
    if not service.welcomes(headers.get("origin"), headers.get("host")):
        return 403, "a page of another origin; expected a page of this server; name the origin with --origins"
    if not service.knows(token_of(websocket)):
        return 401, "no valid token; expected the header Authorization: Bearer TOKEN, or the subprotocol bearer.TOKEN"
    if service.streams >= service.limits.streams:
        return 429, f"{service.streams} streams are open already; expected fewer; try again later"
    return None


def token_of(websocket: WebSocket) -> str | None:
    """The token in the header `Authorization`, or among the subprotocols, where pages in a browser have to put it."""
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token
    offered = websocket.scope.get("subprotocols", [])
    return next((name[len(TOKEN_PREFIX) :] for name in offered if name.startswith(TOKEN_PREFIX)), None)


class Stream:
    """One connection: a reader that keeps the newest request, and a writer that draws it once the last frame was taken."""

    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self.websocket = websocket
        self.service = service
        self._changed = asyncio.Event()
        self._newest: Wanted | None = None
        self._drawing: Wanted | None = None
        self._job: Job | None = None
        self._acknowledges = False
        self._untaken: int | None = None

    async def run(self) -> None:
        """Serve until the client leaves or breaks a rule, which closes the connection with a reason."""
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._withdraw()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, Closed):
                await self._close(error)
            elif error is not None and not isinstance(error, WebSocketDisconnect):
                raise error

    def _withdraw(self) -> None:
        """Take the frame that waits to be drawn out of the queue."""
        if self._job is not None and self._drawing is not None:
            left = self.service.batchers[self._drawing.model].withdraw([self._job])
            self.service.metrics.dropped.labels("client left").inc(left)

    # Reading ---------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            try:
                message = await within(self.service.limits.stream_idle_seconds, self.websocket.receive())
            except asyncio.TimeoutError:
                raise Closed(POLICY, "idle: no message for too long; expected a request; connect again") from None
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                raise Closed(UNSUPPORTED, "a binary message; expected JSON as text; correct the request")
            try:
                await self._understand(text)
            except UserError as error:
                raise Closed(INVALID, str(error)) from None

    async def _understand(self, text: str) -> None:
        if len(text) > self.service.limits.message_bytes:
            raise UserError(
                f"a message of {len(text)} characters; expected at most {self.service.limits.message_bytes}; send less"
            )
        value = parse_json(text)
        if isinstance(value, dict) and "id" not in value:
            self._take(check(Taken, value).taken)
            return
        request = check(self.service.frame_request, value)
        if "taken" in request.model_fields_set:
            self._take(request.taken)
        model, order = await self.service.order(request)
        wanted = Wanted(request, model, order)
        if self._newest is not None:
            self.service.metrics.dropped.labels("newer request").inc()
        if self._replace(wanted):
            self.service.metrics.dropped.labels("newer request").inc()
            self._newest = None
        else:
            self._newest = wanted
            self._changed.set()

    def _take(self, frame: int | None) -> None:
        self._acknowledges = True
        if frame == self._untaken:
            self._untaken = None
        self._changed.set()

    def _replace(self, wanted: Wanted) -> bool:
        """Put the newest request in the place of the one that waits to be drawn, if there is one of the same model."""
        if self._job is None or self._drawing is None or self._drawing.model != wanted.model:
            return False
        if not self.service.batchers[wanted.model].replace(self._job, wanted.order):
            return False
        self._drawing = wanted
        return True

    # Writing ---------------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            while self._newest is None or (self._acknowledges and self._untaken is not None):
                self._changed.clear()
                await self._changed.wait()
            self._drawing, self._newest = self._newest, None
            try:
                self._job = self.service.batchers[self._drawing.model].submit_frame(self._drawing.order)
                drawn = await asyncio.wrap_future(self._job.future)
            except BusyError as error:
                raise Closed(BUSY, f"busy: {error}; expected a shorter queue; connect again later") from None
            except ClosedError as error:
                raise Closed(BUSY, f"{error}; expected it to run; connect again later") from None
            except Exception as error:
                logging.getLogger("uvicorn.error").error("a frame could not be drawn", exc_info=error)
                raise Closed(FAILED, "the frame could not be drawn; the server's log says why; try another") from None
            wanted, self._job = self._drawing, None
            frame = await self._frame(wanted, drawn)
            self._untaken = wanted.request.id
            try:
                await within(self.service.limits.send_seconds, self._send(frame))
            except asyncio.TimeoutError:
                raise Closed(POLICY, "slow: a frame was not taken in time; expected a faster reader") from None
            self.service.metrics.frames.labels(wanted.model).inc()

    async def _frame(self, wanted: Wanted, drawn: Drawn) -> bytes:
        format = wanted.request.format
        content, seconds = await self.service.encode(wanted.model, [drawn], format)
        header: dict[str, Any] = {
            "id": wanted.request.id,
            "shape": list(drawn.images.shape),
            "format": format,
            "columns": columns_of(len(drawn.images)),
            "ms": {part: round(1000 * value, 3) for part, value in seconds.items()},
        }
        return pack(header, content)

    async def _send(self, frame: bytes) -> None:
        """Send, and wait until the frame has left the server, where the transport can tell."""
        await self.websocket.send_bytes(frame)
        if (flow := flow_of(self.websocket)) is not None:
            await flow["sent"]()

    async def _close(self, closed: Closed) -> None:
        self.service.metrics.closed.labels(str(closed.code)).inc()
        reason = closed.reason.encode()[:120].decode(errors="ignore")
        try:
            await within(1.0, self.websocket.close(closed.code, reason))
        except (asyncio.TimeoutError, RuntimeError, WebSocketDisconnect):
            if (flow := flow_of(self.websocket)) is not None:
                flow["abort"]()
