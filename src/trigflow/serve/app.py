"""The HTTP interface, as a FastAPI application."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response, Security
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from trigflow.runtime.errors import UserError
from trigflow.serve.batching import BusyError, ClosedError, Drawn, Job
from trigflow.serve.drawing import Order
from trigflow.serve.limits import Limits
from trigflow.serve.offers import Offer
from trigflow.serve.pages import add_page
from trigflow.serve.requests import check, parse_json
from trigflow.serve.service import Service, within
from trigflow.serve.stream import serve_stream
from trigflow.serve.wire import MEDIA_TYPES, columns_of
from trigflow.version import __version__

BEARER = HTTPBearer(auto_error=False)


class Problem(BaseModel):
    """Why a request was not answered, in one line."""

    detail: str


class Health(BaseModel):
    """Whether the server can draw."""

    status: str


class OfferInfo(BaseModel):
    """What one model takes and gives; without classes, or without a prompt, their number is 0. Edits can keep
    something of one that draws `pixels`, and not latents."""

    kind: str
    shape: list[int]
    pixels: bool
    classes: int
    class_names: list[str]
    prompt_bytes: int
    guidance: list[float]
    steps: list[int]
    default_steps: int


class ServerInfo(BaseModel):
    """The models of this server, its limits, and the model of a request that names none."""

    version: str
    default: str
    models: dict[str, OfferInfo]
    limits: dict[str, float]


def create_app(
    offers: Sequence[Offer], limits: Limits | None = None, *, token: str | None = None, origins: Sequence[str] = ()
) -> FastAPI:
    """The application that serves these models; it starts and ends their workers with its own life (its lifespan, which an
    application that it is mounted in has to enter).

    Args:
        offers: see `trigflow.serve.offers`; the first one is what a request gets that names none.
        limits: see `Limits`.
        token: clients must show it as `Authorization: Bearer TOKEN` for everything but `/healthz`, the page at `/` and the
            documentation.
        origins: pages from elsewhere, such as `https://example.org`, that may open streams.

    Raises:
        UserError: for no offers or two of one name, and for a token or origins that are none.
    """
    service = Service(offers, limits or Limits(), token, origins)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="trigflow",
        version=__version__,
        description="Draws images in one or two steps.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        servers=[{"url": "."}],  # beside the document, wherever a proxy puts it
        root_path_in_servers=False,
        exception_handlers={UserError: _unusable, BusyError: _busy, ClosedError: _closed, ClientDisconnect: _left},
    )
    app.state.service = service
    app.add_middleware(Counted, service=service)
    _add_routes(app, service)
    add_page(app)
    document: dict[str, Any] = {"openapi_url": "openapi.json", "title": "trigflow"}
    app.add_route("/docs", lambda request: get_swagger_ui_html(**document), include_in_schema=False)
    app.add_route("/redoc", lambda request: get_redoc_html(**document), include_in_schema=False)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    def authorize(shown: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]) -> None:
        if not service.knows(shown.credentials if shown else None):
            raise HTTPException(
                401, "no valid token; expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    locked = [] if service.token is None else [Depends(authorize)]
    unauthorized = _problems(401) if locked else {}

    @app.get("/healthz", responses=_problems(503))
    async def healthz() -> Health:
        """Whether the server can draw; no token needed."""
        if not service.healthy:
            raise HTTPException(503, "a worker has ended; expected it to run; restart the server")
        return Health(status="ok")

    @app.get("/metrics", dependencies=locked, response_class=Response, responses={200: _media("text/plain"), **unauthorized})
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/model", dependencies=locked, responses=unauthorized)
    async def model() -> ServerInfo:
        """What is served: models, classes, bytes of a prompt, ranges of guidance and steps, limits."""
        return describe(service)

    def drawing(body: type[BaseModel]) -> dict[str, Any]:
        """What is said of a route that draws what a body of this kind asks for."""
        content = {"application/json": {"schema": body.model_json_schema()}}
        answers = {200: _media(*sorted({*MEDIA_TYPES.values()})), **_problems(408, 413, 415, 422, 429, 503)}
        return {
            "dependencies": locked,
            "response_class": Response,
            "responses": {**answers, **unauthorized},
            "openapi_extra": {"requestBody": {"required": True, "content": content}},
        }

    @app.post("/v1/images", **drawing(service.images_request))
    async def images(request: Request) -> Response:
        """Draw images: one sheet (PNG, WebP) or the pixels (npy). The same request gives the same images."""
        asked = check(service.images_request, parse_json(await read_body(request, service.limits)))
        return await answer(request, *await service.order(asked), asked.format)

    @app.post("/v1/edit", **drawing(service.edit_request))
    async def edit(request: Request) -> Response:
        """Draw from a picture: others like it, what is under a mask, its colours, or its details; otherwise as `/v1/images`."""
        asked = check(service.edit_request, parse_json(await read_body(request, service.limits, service.limits.edit_bytes)))
        return await answer(request, *await service.edit_order(asked), asked.format)

    async def answer(request: Request, name: str, order: Order, format: str) -> Response:
        jobs = service.batchers[name].submit(order)
        drawn = await _wait_for(request, service, name, jobs)
        content, seconds = await service.encode(name, drawn, format)
        headers = {
            "X-Trigflow-Shape": ",".join(map(str, (len(order), *drawn[0].images.shape[1:]))),
            "X-Trigflow-Columns": str(columns_of(len(order))),
            "Server-Timing": ", ".join(f"{part};dur={1000 * value:.3f}" for part, value in seconds.items()),
        }
        return Response(content, media_type=MEDIA_TYPES[format], headers=headers)

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await serve_stream(websocket, service)


def describe(service: Service) -> ServerInfo:
    """The answer of `GET /v1/model`."""
    models = {
        offer.name: OfferInfo(
            kind=offer.model.kind,
            shape=list(offer.shape),
            pixels=offer.model.codec.pictured,
            classes=offer.model.num_classes,
            class_names=list(offer.model.class_names),
            prompt_bytes=offer.prompt_bytes,
            guidance=list(offer.guidance),
            steps=list(offer.steps),
            default_steps=offer.model.default_steps(),
        )
        for offer in service.offers.values()
    }
    return ServerInfo(version=__version__, default=service.default, models=models, limits=vars(service.limits))


async def read_body(request: Request, limits: Limits, most: int | None = None) -> bytes:
    """The body of a JSON request, of at most so many bytes; `limits.body_bytes` by default, and never of more values than fit
    into that, as it takes seconds to read millions. Raises a HTTPException 415 for another type, 413 for too large a body, 408
    for one that takes too long to come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"a body of type '{kind[:40]}'; expected application/json; set Content-Type")
    try:
        body = await within(limits.silent_seconds, _read(request, most or limits.body_bytes))
    except asyncio.TimeoutError:
        message = f"no whole body within {limits.silent_seconds:g} s; expected it sooner; try again"
        raise HTTPException(408, message, {"Connection": "close"}) from None
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.body_bytes:
        raise HTTPException(413, f"a body of more than {limits.body_bytes} values; expected fewer; ask for less")
    return body


async def _read(request: Request, most: int) -> bytes:
    body = bytearray()
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:18]) <= most:
        async for part in request.stream():
            body += part
            if len(body) > most:
                break
        else:
            return bytes(body)
    message = f"a body of more than {most} bytes; expected fewer; ask for less"
    raise HTTPException(413, message, {"Connection": "close"})


async def _wait_for(request: Request, service: Service, name: str, jobs: Sequence[Job]) -> list[Drawn]:
    """The pictures, unless the client leaves first: then its jobs leave the queue, too."""
    pictures = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    leaving = asyncio.ensure_future(_leaves(request))
    both: set[asyncio.Future[Any]] = {pictures, leaving}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not pictures.done():
            raise ClientDisconnect
        return pictures.result()
    finally:
        left = service.batchers[name].withdraw(jobs)
        service.metrics.dropped.labels("client left").inc(left)
        leaving.cancel()
        pictures.cancel()


async def _leaves(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unusable(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _busy(request: Request, error: Any) -> JSONResponse:
    detail = f"{error}; expected a shorter queue; try again in {error.retry_after} s"
    return JSONResponse({"detail": detail}, 429, {"Retry-After": str(error.retry_after)})


async def _closed(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": f"{error}; expected it to run; try again later"}, 503, {"Retry-After": "5"})


async def _left(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


class Counted:
    """Counts requests by path and status, and lets HEAD be asked wherever GET is."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.requests = service.metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"  # answered as GET is, without the body
        scope = {**scope, "method": "GET"} if head else scope

        def count(status: int) -> None:
            self.requests.labels(getattr(scope.get("route"), "path", "other"), str(status)).inc()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send({**message, "body": b""} if head and "body" in message else message)

        try:
            await self.app(scope, receive, counted)
        except Exception:  # answered with 500 further out
            count(500)
            raise


def _media(*types: str) -> dict[str, Any]:
    schema = {"type": "string"} if types == ("text/plain",) else {"type": "string", "format": "binary"}
    return {"content": {kind: {"schema": schema} for kind in types}}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}
