"""The files of the page, as they are sent; what they do is tested in tests/browser."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serve.helpers import StubDrawer, stub_offer, student
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of
from trigflow.serve.pages import FOLDER, TYPES

TOKEN = "a-token.of_enough~letters"
FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server that wants a token, which the page does not need."""
    with TestClient(create_app([stub_offer(StubDrawer())], token=TOKEN)) as client:
        yield client


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_files(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TYPES["." + (path.rpartition(".")[2] if "." in path else "html")]
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in answer.headers
    again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == answer.headers["content-security-policy"]
    assert client.head(path).status_code == 200
    assert client.post(path).status_code == 405


@pytest.mark.parametrize(
    "path", ["/page/", "/page/main", "/page/../pages.py", "/page/%2e%2e/pages.py", "/page/..%2fpages.py", "/page//etc/passwd"]
)
def test_other_names_are_not_found(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_needs_nothing_else() -> None:
    """No script or style in the page, no address of another server, and all modules named so that they load at once."""
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page) == []
    named = set(re.findall(r'(?:href|src)="page/([^"]+)"', page))
    assert named == set(FILES) - {"index.html"}
    imported: set[str] = set()
    for name in FILES:
        text = (FOLDER / name).read_text()
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) <= {"http://www.w3.org"}, name  # a namespace
        imported |= set(re.findall(r'from "\./([\w.]+)"', text))
    assert imported == {name for name in FILES if name.endswith(".js")} - {"main.js", "theme.js"}


def test_the_page_is_no_part_of_the_api(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/page")]


def test_a_picture_by_its_number() -> None:
    """`first` tells which pictures of a seed are drawn; each is the one that a longer request has there."""
    with TestClient(create_app([offer_of(student(), Limits())])) as client:

        def draw(**asked: object) -> np.ndarray[object, np.dtype[np.uint8]]:
            answer = client.post("/v1/images", json={"seed": 3, "format": "npy", **asked})
            return np.load(io.BytesIO(answer.content), allow_pickle=False)  # type: ignore[no-any-return]

        for labels in (None, [7, 2], 4, {"1": 1, "2": 3}):
            ten = draw(count=10, labels=labels).astype(int)
            assert np.abs(draw(count=3, first=5, labels=labels) - ten[5:8]).max() <= 1
        assert draw(first=2**31 - 1).shape == (1, 1, 8, 8)
        for first in (-1, 2**31, 1.5, None):
            assert client.post("/v1/images", json={"first": first}).status_code == 422
