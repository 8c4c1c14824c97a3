"""The page at `/`: files that lie beside this module, read once, sent as they are."""

import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    [
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
    ]
)
"""Content Security Policy: nothing is loaded from elsewhere or sent there, and no text becomes a script."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, but asked for again each time: a new server may bring a new page
}


class PageFile:
    """One file as an answer, with a tag by which a browser that has it is told so (304)."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.type = TYPES[path.suffix]
        self.tag = f'"{hashlib.sha256(self.content).hexdigest()[:20]}"'

    def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.type, headers=headers)


def add_page(app: FastAPI) -> None:
    """Answer `/` with index.html and `/page/NAME` with the other files of `FOLDER`.

    They hold nothing secret and need no token: what the page knows of the model it asks for as any client does. No name
    reaches the file system, so that there is nothing to find but these files.
    """
    files = {path.name: PageFile(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}

    async def answer(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        return files[name].answer(request) if name in files else Response("no such file", 404, headers=HEADERS)

    for path in ("/", "/page/{name}"):
        app.add_route(path, answer, ["GET"], include_in_schema=False)
