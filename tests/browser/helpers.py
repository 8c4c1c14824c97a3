"""A page that is open in the browser, and what it should show."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np

from trigflow.serve.limits import Limits

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
LIMITS = Limits()
SECONDS = 20.0
"""How long a slow machine may take for anything."""


class Visit:
    """A page with all that it asked for.

    Attributes:
        page: Playwright's page.
        asked: requests for frames, newest last.
        edits: requests for edits, newest last.
        sockets: their addresses.
        requests: addresses of everything else.
        errors: lines in the console.
        ignored: parts of lines that a test expects there.
        token: shown by the test itself when it asks the server.
    """

    def __init__(self, page: Any, port: int) -> None:
        self.page = page
        self.origin = f"127.0.0.1:{port}"
        self.asked: list[dict[str, Any]] = []
        self.edits: list[dict[str, Any]] = []
        self.sockets: list[str] = []
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.ignored: tuple[str, ...] = ()
        self.token: str | None = None
        self._known: tuple[dict[str, Any], Pixels] = {}, np.empty((0, 8, 8), np.uint8)
        page.set_default_timeout(1000 * SECONDS)
        page.on("websocket", self._watch)
        page.on("request", self._requested)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def _watch(self, socket: Any) -> None:
        self.sockets.append(socket.url)
        socket.on("framesent", self._sent)

    def _sent(self, payload: str | bytes) -> None:
        message = json.loads(payload)
        if "id" in message:
            self.asked.append(message)

    def _requested(self, request: Any) -> None:
        self.requests.append(request.url)
        if request.url.endswith("/v1/edit"):
            self.edits.append(request.post_data_json)

    def open(self, fragment: str = "") -> None:
        self.page.goto(f"http://{self.origin}/{fragment}")

    def check(self) -> None:
        """Nothing went wrong, and nothing was asked of anybody else."""
        unexpected = [line for line in self.errors if not any(part in line for part in self.ignored)]
        assert unexpected == []
        for address in (*self.sockets, *self.requests):
            assert address.split("://")[1].startswith(f"{self.origin}/") or address.startswith("blob:"), address

    # What it shows ---------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until the condition holds; fail if it does not in time."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"never: {what}"
            self.page.wait_for_timeout(15)

    def canvas(self, figure: str = "first") -> Pixels:
        """The canvas as it is, uint8 (h, w, 4)."""
        read = """id => {
            const canvas = document.querySelector(`#${id} canvas`)
            const { width, height } = canvas
            return [height, width, Array.from(canvas.getContext("2d").getImageData(0, 0, width, height).data)]
        }"""
        h, w, data = self.page.evaluate(read, figure)
        return np.array(data, dtype=np.uint8).reshape(h, w, 4)

    def pictures(self, figure: str = "first") -> Pixels:
        """The pictures on the canvas, uint8 (n, h, w), of a model of 8x8 grey ones; none before the first frame."""
        sheet = self.canvas(figure)[..., 0]
        if any(size % 9 != 8 for size in sheet.shape):
            return np.empty((0, 8, 8), np.uint8)
        rows, columns = (-(-size // 9) for size in sheet.shape)
        return np.stack([sheet[9 * r : 9 * r + 8, 9 * c : 9 * c + 8] for r in range(rows) for c in range(columns)])

    def milliseconds(self, selector: str) -> float:
        """A time that is shown; 0 before the first."""
        text = self.page.inner_text(selector)
        return 0.0 if text == "–" else float(text)

    def _asked_for(self, model: str) -> bool:
        return any(asked["model"] == model for asked in self.asked)

    def last(self, model: str = "student") -> dict[str, Any]:
        """The newest request for this model."""
        return next(asked for asked in reversed(self.asked) if asked["model"] == model)

    def drawn(self, asked: dict[str, Any]) -> Pixels:
        """What the API answers to such a request, uint8 (n, h, w)."""
        body = {name: value for name, value in asked.items() if name not in ("id", "taken", "format")}
        if body == self._known[0]:
            return self._known[1]
        pictures = self.answer("images", {**body, "format": "npy"})
        self._known = body, pictures[:, 0]
        return pictures[:, 0]

    def answer(self, path: str, body: dict[str, Any]) -> Pixels:
        """What the API answers to such a request in the format npy, uint8 (n, c, h, w)."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(f"http://{self.origin}/v1/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            pictures: Pixels = np.load(io.BytesIO(answer.read()), allow_pickle=False)
        return pictures

    def shows(self, asked: dict[str, Any], figure: str = "first") -> bool:
        """Whether the canvas shows the answer to this request, but for rounding."""
        pictures, expected = self.pictures(figure), self.drawn(asked)
        if len(pictures) < len(expected):
            return False
        difference = np.abs(pictures[: len(expected)].astype(int) - expected)
        return bool(difference.max() <= 1)

    def settle(self, model: str = "student", figure: str = "first") -> dict[str, Any]:
        """Wait until the newest request is on the canvas; that request."""
        self.until(lambda: self._asked_for(model) and self.shows(self.last(model), figure), "the picture that was asked for")
        return self.last(model)

    # What is done to it ----------------------------------------------------------------------------------------------

    def center(self, selector: str = "#stage") -> tuple[float, float]:
        box = self.page.locator(selector).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, dx: float, dy: float, steps: int = 10) -> None:
        """Drag from the middle of the stage."""
        x, y = self.center()
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + dx, y + dy, steps=steps)
        mouse.up()

    def slide(self, name: str, key: str = "ArrowRight", times: int = 1) -> None:
        """Move the slider of this name by keys."""
        slider = self.page.get_by_role("slider", name=name, exact=True)
        slider.focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def view(self, name: str) -> None:
        """Go to another view."""
        self.page.get_by_role("radio", name=name, exact=True).check(force=True)
