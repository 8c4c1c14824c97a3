"""Classes by name, and conditions of a model's own, as clients of the server say them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from deploy.students import NAMES, named, windy
from serve.helpers import student
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of
from trigflow.serve.stream import PROTOCOL
from trigflow.serve.wire import pixels, unpack

LIMITS = Limits(images=32, batch=4, window_ms=0)
STUDENT = named(student())
WINDY = windy()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of a student whose classes have names."""
    with TestClient(create_app([offer_of(STUDENT, LIMITS)], LIMITS)) as client:
        yield client


@pytest.fixture(scope="module")
def windward() -> Iterator[TestClient]:
    """A server of a student that is told the wind, too."""
    with TestClient(create_app([offer_of(WINDY, LIMITS)], LIMITS)) as client:
        yield client


def pictures(client: TestClient, **asked: Any) -> torch.Tensor:
    answer = client.post("/v1/images", json={"format": "npy", "seed": 4, **asked})
    assert answer.status_code == 200, answer.text
    return torch.from_numpy(np.load(io.BytesIO(answer.content), allow_pickle=False))


def refused(client: TestClient, **asked: Any) -> str:
    answer = client.post("/v1/images", json=asked)
    assert answer.status_code == 422
    said: str = answer.json()["detail"]
    assert "\n" not in said
    return said


def levels(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize(
    ("said", "labels"), [("three", 3), (3, 3), (["three", 7, "zero"], [3, 7, 0]), ({"three": 1.0}, 3), (None, None)]
)
def test_classes_by_name_are_those_by_number(said: Any, labels: Any, client: TestClient) -> None:
    expected = STUDENT.sample(4, labels=labels, seed=4)
    assert torch.equal(pictures(client, count=4, labels=said), expected)


def test_weights_of_a_mix_by_name_are_those_by_number(client: TestClient) -> None:
    by_name = pictures(client, labels={"three": 0.25, "seven": 0.75})
    assert torch.equal(by_name, pictures(client, labels={"3": 1.0, "7": 3.0}))
    assert not torch.equal(by_name, pictures(client, labels={"3": 3.0, "7": 1.0}))


@pytest.mark.parametrize(
    "said",
    [
        "cat",
        "Three",
        10,
        -1,
        2.5,
        True,
        [],
        ["three", "cat"],
        [0, 10],
        [1.5],
        [[1, 0]],
        {"cat": 1.0},
        {"three": -1.0},
        {},
    ],
)
def test_unknown_classes_are_refused(said: Any, client: TestClient) -> None:
    assert refused(client, labels=said).startswith("labels")


def test_a_stream_takes_names_too(client: TestClient) -> None:
    with client.websocket_connect("/v1/stream", subprotocols=[PROTOCOL]) as stream:
        stream.send_text(json.dumps({"id": 1, "labels": ["nine"], "seed": 4}))
        header, content = unpack(stream.receive_bytes())
        assert torch.equal(pixels(header, content), STUDENT.sample(1, labels=9, seed=4))


def test_what_is_served_has_the_names(client: TestClient) -> None:
    assert client.get("/v1/model").json()["models"]["student"]["class_names"] == list(NAMES)
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/images"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "seven" in json.dumps(body["properties"]["labels"])


def test_conditions_reach_the_network(windward: TestClient) -> None:
    calm = pictures(windward, count=3, labels="two")
    assert levels(calm, WINDY.sample(3, labels=2, seed=4)) <= 1
    for wind in ([0.5, -2.0], [3, 1]):
        blown = pictures(windward, count=3, labels="two", conditions={"wind": wind})
        assert levels(blown, WINDY.sample(3, labels=2, seed=4, conditions={"wind": wind})) <= 1
        assert levels(blown, calm) > 3
    assert torch.equal(pictures(windward, count=3, labels="two", conditions={"wind": [1, -1]}), calm)
    assert torch.equal(pictures(windward, count=3, labels="two", conditions=None), calm)


def test_conditions_of_a_mix_and_of_a_long_request(windward: TestClient) -> None:
    """A mix is drawn with the wind of its picture; a request of several batches with the same wind in each."""
    said: dict[str, Any] = {"conditions": {"wind": [3.0, 1.0]}}
    mixed = pictures(windward, labels={"two": 1.0}, **said)
    assert torch.equal(mixed, pictures(windward, labels=2, **said))
    between = pictures(windward, labels={"two": 0.5, "nine": 0.5}, **said)
    assert levels(between, pictures(windward, labels={"two": 0.5, "nine": 0.5})) > 3
    many = pictures(windward, count=10, labels=2, **said)
    assert levels(many, WINDY.sample(10, labels=2, seed=4, conditions=said["conditions"])) <= 1


@pytest.mark.parametrize(
    "said",
    [
        {"rain": 1.0},
        {"label": 3},
        {"wind": [1.0, 2.0, 3.0]},
        {"wind": "strong"},
        {"wind": []},
        {"wind": None},
        [1.0, 2.0],
    ],
)
def test_bad_conditions_are_refused(said: Any, windward: TestClient) -> None:
    words = refused(windward, conditions=said)
    assert "wind" in words or "conditions" in words


def test_a_model_without_conditions_of_its_own_takes_none(client: TestClient) -> None:
    assert "conditions" in refused(client, conditions={"wind": [1.0, 2.0]})
    assert pictures(client, conditions=None).shape == (1, 1, 8, 8)


def test_a_stream_takes_conditions(windward: TestClient) -> None:
    with windward.websocket_connect("/v1/stream", subprotocols=[PROTOCOL]) as stream:
        stream.send_text(json.dumps({"id": 1, "labels": "two", "seed": 4, "conditions": {"wind": [3.0, 1.0]}}))
        header, content = unpack(stream.receive_bytes())
    expected = WINDY.sample(1, labels=2, seed=4, conditions={"wind": [3.0, 1.0]})
    assert levels(pixels(header, content), expected) <= 1
