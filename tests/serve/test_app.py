"""The HTTP interface: what it answers, and what it refuses."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.websockets import WebSocketDisconnect

from serve.helpers import StubDrawer, plain, stub_offer, student, teacher, wait_for
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of

LIMITS = Limits(images=32, batch=16, queue=20, body_bytes=2_000, window_ms=0)
TOKEN = "a-token.of_enough~letters"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of a student and its teacher."""
    app = create_app([offer_of(student(), LIMITS), offer_of(teacher(), LIMITS)], LIMITS)
    with TestClient(app) as client:
        yield client


@pytest.fixture
def drawer() -> StubDrawer:
    return StubDrawer()


@pytest.fixture
def stub(drawer: StubDrawer) -> Iterator[TestClient]:
    """A server whose drawer obeys the test."""
    with TestClient(create_app([stub_offer(drawer, LIMITS)], LIMITS), raise_server_exceptions=False) as client:
        yield client
        drawer.release()


def array(content: bytes) -> np.ndarray[Any, Any]:
    loaded: np.ndarray[Any, Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return loaded


def test_npy_is_what_sampling_draws(client: TestClient) -> None:
    asked = {"count": 5, "seed": 11, "labels": [3, 7], "steps": 2, "format": "npy"}
    answer = client.post("/v1/images", json=asked)
    assert answer.status_code == 200
    assert answer.headers["x-trigflow-shape"] == "5,1,8,8"
    expected = student().sample(5, seed=11, labels=[3, 7], steps=2).numpy()
    assert np.array_equal(array(answer.content), expected)


def test_a_long_request_is_one_answer(client: TestClient) -> None:
    drawn = array(client.post("/v1/images", json={"count": 32, "format": "npy"}).content)
    expected = student().sample(32).numpy().astype(int)
    assert np.abs(drawn - expected).max() <= 1  # drawn in two batches: rounded differently


def test_an_integer_may_be_written_with_a_point(client: TestClient) -> None:
    raw = b'{"count": 2.0, "seed": 1e3, "guidance": 1, "format": "npy"}'
    answer = client.post("/v1/images", content=raw, headers={"content-type": "application/json"})
    assert np.array_equal(array(answer.content), student().sample(2, seed=1000).numpy())


@pytest.mark.parametrize("format", ["png", "webp"])
def test_sheets_hold_the_same_pixels(client: TestClient, format: str) -> None:
    asked = {"count": 5, "seed": 2, "format": format}
    answer = client.post("/v1/images", json=asked)
    assert answer.headers["content-type"] == f"image/{format}"
    assert answer.headers["x-trigflow-columns"] == "3"
    sheet = np.asarray(Image.open(io.BytesIO(answer.content)).convert("L"))
    assert sheet.shape == (16, 24)
    pictures = array(client.post("/v1/images", json=asked | {"format": "npy"}).content)
    cells = sheet.reshape(2, 8, 3, 8).transpose(0, 2, 1, 3).reshape(6, 8, 8)
    assert np.array_equal(cells[:5], pictures[:, 0])
    assert (cells[5] == 255).all()


def test_the_same_request_gives_the_same_picture_and_times(client: TestClient) -> None:
    asked = {"seed": 3, "labels": {"3": 0.7, "5": 0.3}, "walk": [1.0, 2.0]}
    first, second = (client.post("/v1/images", json=asked) for _ in range(2))
    assert first.content == second.content
    assert [part.split(";")[0] for part in first.headers["server-timing"].split(", ")] == ["queue", "network", "encode"]


def test_teacher_with_guidance(client: TestClient) -> None:
    asked = {"count": 2, "model": "teacher", "guidance": 2.0, "steps": 2, "format": "npy"}
    expected = teacher().sample(2, guidance=2.0, steps=2).numpy()
    assert np.array_equal(array(client.post("/v1/images", json=asked).content), expected)


def test_what_is_served(client: TestClient) -> None:
    info = client.get("/v1/model").json()
    assert info["default"] == "student"
    assert info["limits"]["images"] == 32
    assert info["models"]["student"] == {
        "kind": "consistency",
        "shape": [1, 8, 8],
        "pixels": True,
        "classes": 10,
        "class_names": [str(digit) for digit in range(10)],
        "prompt_bytes": 0,
        "guidance": [1.0, 1.0],
        "steps": [1, 64],
        "default_steps": 2,
    }
    assert info["models"]["teacher"]["guidance"] == [1.0, 10.0]


HUGE = "9" * 1_500


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"count": 33}', 422),
        ('{"count": 0}', 422),
        ('{"count": 1e9}', 422),
        (f'{{"count": {HUGE}}}', 422),
        (f'{{"seed": {HUGE}}}', 422),
        ('{"seed": -1}', 422),
        ('{"seed": 1.5}', 422),
        ('{"count": "4"}', 422),
        ('{"count": true}', 422),
        ('{"guidance": NaN}', 422),
        ('{"guidance": Infinity}', 422),
        ('{"guidance": 1e999}', 422),
        ('{"guidance": 2.0}', 422),
        ('{"guidance": 11.0, "model": "teacher"}', 422),
        ('{"labels": 10}', 422),
        ('{"labels": -1}', 422),
        ('{"labels": []}', 422),
        ('{"labels": [0, 10]}', 422),
        ('{"labels": {}}', 422),
        ('{"labels": {"1": 0}}', 422),
        ('{"labels": {"1": -1}}', 422),
        ('{"labels": {"one": 1}}', 422),
        ('{"labels": {"0": 1, "1": 1, "2": 1, "3": 1, "4": 1}}', 422),
        ('{"steps": 0}', 422),
        ('{"steps": 65}', 422),
        ('{"walk": [0]}', 422),
        ('{"walk": [0, NaN]}', 422),
        ('{"model": "../../etc/passwd"}', 422),
        ('{"format": "exe"}', 422),
        ('{"unknown": 1}', 422),
        ("[]", 422),
        ("", 422),
        ("{", 422),
        ("[" * 1_900, 422),
        ("\udcff", 422),
        (f'{{"labels": [{"0," * 990}0]}}', 422),
        (" " * 2_001, 413),
    ],
)
def test_bad_requests(client: TestClient, body: str, status: int) -> None:
    raw = body.encode(errors="surrogateescape")
    answer = client.post("/v1/images", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert set(answer.json()) == {"detail"}
    assert "\n" not in answer.json()["detail"]
    assert len(answer.json()["detail"]) < 500


def test_other_types_are_refused(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("/v1/images", content=b"{}", headers={"content-type": kind}).status_code == 415


def test_a_body_of_unknown_length_is_bounded(client: TestClient) -> None:
    answer = client.post("/v1/images", content=iter([b" " * 1_000] * 3), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert client.post("/v1/images", json={}).status_code == 200


def test_requests_that_arrive_together_are_drawn_together(stub: TestClient, drawer: StubDrawer) -> None:
    batcher = stub.app.state.service.batchers["student"]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(4) as pool:
        drawer.hold()
        first = pool.submit(stub.post, "/v1/images", json={"seed": 0})
        drawer.wait_until_drawing()
        others = [pool.submit(stub.post, "/v1/images", json={"seed": seed, "count": 2}) for seed in (1, 2, 3)]
        wait_for(lambda: batcher.waiting == 6)
        drawer.release()
        assert {answer.result().status_code for answer in (first, *others)} == {200}
    assert drawer.batches == [(1, 2), (6, 2)]


def test_a_full_queue_says_when_to_come_again(stub: TestClient, drawer: StubDrawer) -> None:
    batcher = stub.app.state.service.batchers["student"]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        drawer.hold()
        waiting = [pool.submit(stub.post, "/v1/images", json={"count": 1})]
        drawer.wait_until_drawing()
        waiting.append(pool.submit(stub.post, "/v1/images", json={"count": 20}))
        wait_for(lambda: batcher.waiting == 20)
        refused = stub.post("/v1/images", json={"count": 1})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        drawer.release()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
    assert stub.post("/v1/images", json={"count": 1}).status_code == 200


def test_a_drawer_that_fails_is_a_server_error_and_no_end(stub: TestClient, drawer: StubDrawer) -> None:
    drawer.fail = True
    assert stub.post("/v1/images", json={}).status_code == 500
    drawer.fail = False
    assert stub.post("/v1/images", json={}).status_code == 200
    assert stub.get("/healthz").json() == {"status": "ok"}
    assert 'trigflow_requests_total{path="/v1/images",status="500"} 1.0' in stub.get("/metrics").text


def test_health_notices_a_worker_that_ended(drawer: StubDrawer) -> None:
    with TestClient(create_app([stub_offer(drawer)])) as client:
        assert client.get("/healthz").status_code == 200
        client.app.state.service.close()  # type: ignore[attr-defined]
        assert client.get("/healthz").status_code == 503
        assert client.post("/v1/images", json={}).status_code == 503


def test_figures(stub: TestClient) -> None:
    stub.post("/v1/images", json={"count": 3})
    stub.post("/v1/images", json={"count": 0})
    stub.get("/no/such/page")
    text = stub.get("/metrics").text
    for line in (
        'trigflow_requests_total{path="/v1/images",status="200"} 1.0',
        'trigflow_requests_total{path="/v1/images",status="422"} 1.0',
        'trigflow_requests_total{path="other",status="404"} 1.0',
        'trigflow_images_total{model="student"} 3.0',
        'trigflow_batch_images_sum{model="student"} 3.0',
        'trigflow_queue_images{model="student"} 0.0',
        'trigflow_seconds_count{model="student",part="network"} 1.0',
        "trigflow_streams 0.0",
    ):
        assert line in text


def test_token() -> None:
    with TestClient(create_app([stub_offer(StubDrawer())], token=TOKEN)) as client:
        assert client.get("/healthz").status_code == 200
        for shown in (None, "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer \xff"):
            headers = {} if shown is None else {"authorization": shown.encode("latin-1")}
            for method, path in (("GET", "/v1/model"), ("GET", "/metrics"), ("POST", "/v1/images")):
                answer = client.request(method, path, headers=headers, content=b"{}")  # type: ignore[arg-type]
                assert answer.status_code == 401, (shown, path)
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/model", headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        assert client.post("/v1/images", json={}, headers=right).status_code == 200


def test_a_model_without_classes() -> None:
    with TestClient(create_app([offer_of(plain(), Limits())])) as client:
        assert client.post("/v1/images", json={"count": 2}).status_code == 200
        assert client.get("/v1/model").json()["models"]["student"]["classes"] == 0


def test_the_document_says_the_bounds(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schema = document["paths"]["/v1/images"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["count"]["maximum"] == 32
    assert schema["properties"]["guidance"] | {"minimum": 1, "maximum": 10} == schema["properties"]["guidance"]
    assert schema["additionalProperties"] is False
    assert json.dumps(document)


@pytest.mark.parametrize(("path", "named"), [("/docs", "url: 'openapi.json'"), ("/redoc", 'spec-url="openapi.json"')])
@pytest.mark.parametrize("prefix", ["", "/draw"])
def test_the_documentation_is_found_behind_a_prefix(path: str, named: str, prefix: str, drawer: StubDrawer) -> None:
    """The viewer asks for the document beside itself, and the document's paths begin beside the document."""
    app = create_app([stub_offer(drawer)])
    outer = Starlette(routes=[Mount(prefix, app)])
    client = TestClient(outer if prefix else app)
    page = client.get(f"{prefix}{path}")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert named in page.text
    assert not re.search("[\"'=]/[a-z]", page.text)
    document = client.get(f"{prefix}/openapi.json").json()
    assert document["servers"] == [{"url": "."}]
    assert set(document["paths"]) == {"/healthz", "/metrics", "/v1/model", "/v1/images", "/v1/edit"}
    assert [set(methods) for methods in document["paths"].values()] == [{"get"}] * 3 + [{"post"}] * 2


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/redoc", "/openapi.json", "/healthz", "/metrics", "/v1/model", "/page/main.js"]
)
def test_head_is_answered_as_get_without_a_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # which counts these requests
        assert head.headers["content-length"] == str(len(get.content))


def test_head_is_refused_where_get_is(client: TestClient) -> None:
    assert client.head("/v1/images").status_code == client.get("/v1/images").status_code == 405
    assert client.head("/none").status_code == 404
    with TestClient(create_app([stub_offer(StubDrawer())], token=TOKEN)) as locked:
        assert locked.head("/v1/model").status_code == 401


def test_without_workers_nobody_waits_for_ever() -> None:
    """Mounted in an application that does not enter its lifespan, it says so at once."""
    client = TestClient(Starlette(routes=[Mount("/draw", create_app([stub_offer(StubDrawer())]))]))
    assert client.get("/draw/healthz").status_code == 503
    answer = client.post("/draw/v1/images", json={})
    assert answer.status_code == 503
    assert answer.json()["detail"].startswith("no worker of the server runs; expected it to run")
    with client.websocket_connect("/draw/v1/stream") as stream:
        stream.send_text('{"id": 1}')
        with pytest.raises(WebSocketDisconnect) as closed:
            stream.receive_bytes()
        assert closed.value.code == 1013
