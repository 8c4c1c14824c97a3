"""Classes by name, and conditions of a model's own, as clients of the server say them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from deploy.students import NAMES, named, windy
from serve.helpers import pictures, pixels, plain, student
from trigflow.conditions import Conditioner
from trigflow.runtime.errors import UserError
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of
from trigflow.serve.stream import PROTOCOL
from trigflow.serve.wire import unpack

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


BAD: list[tuple[Any, str]] = [
    ("cat", "labels: there is no class 'cat'; expected one of zero, one, two"),
    ("Three", "labels: there is no class 'Three'"),
    ("a\nb", r"labels: there is no class 'a\nb'; expected one of zero"),
    ("x" * 1000, "labels: there is no class 'xxxxxx"),
    ("", "labels: there is no class ''"),
    (10, "label 10 is out of range; expected 0 to 9"),
    (-1, "label -1 is out of range; expected 0 to 9"),
    (10**100, "label 1000000000"),
    (2.5, "labels: 2.5 is no class; expected a whole number or a name"),
    (True, "labels: True is no class"),
    ([], "an empty list of labels; expected at least one class"),
    (["three", "cat"], "labels: there is no class 'cat'"),
    ([0, 10], "label 10 is out of range; expected 0 to 9"),
    ([7.5], "labels: 7.5 is no class"),
    ([None], "labels: None is no class"),
    ([[1, 0]], "labels: [1, 0] is no class"),
    ([{"three": 1}], "labels: {'three': 1} is no class"),
    ([0] * 33, "labels [0, 0, 0, 0, 0, 0, ...]; expected a class by number or name, a list of at most 32 of them"),
    ({"cat": 1.0}, "labels: there is no class 'cat'"),
    ({"cat": 0, "one": 1}, "labels: there is no class 'cat'"),
    ({"10": 1.0}, "label 10 is out of range"),
    ({"three": -1}, "a mix of labels with the weights [-1]; expected numbers of at least 0"),
    ({"three": 0}, "a mix of labels with the weights [0]; expected numbers of at least 0"),
    ({"three": "much"}, "a mix of labels with the weights ['much']; expected numbers"),
    ({"three": True}, "a mix of labels with the weights [True]; expected numbers"),
    ({"three": None}, "a mix of labels with the weights [None]; expected numbers"),
    ({}, "a mix of labels with the weights []"),
    (dict.fromkeys(NAMES[:5], 1), "a mix of 5 labels; expected at most 4"),
]


@pytest.mark.parametrize(("said", "words"), BAD)
def test_unknown_classes_are_refused_in_the_words_of_python(said: Any, words: str, client: TestClient) -> None:
    answer = refused(client, labels=said)
    assert answer.startswith(words)
    assert answer.count("; ") == 2
    assert "Input should" not in answer
    assert len(answer) < 300
    if not isinstance(said, list) or len(said) < 33:
        with pytest.raises(UserError) as caught:
            offer_of(STUDENT, LIMITS).order(labels=said)
        assert str(caught.value) == answer


@pytest.mark.parametrize("said", [0, [0], "cat", {"0": 1.0}, {}, []])
def test_labels_of_a_model_without_classes_are_refused(said: Any) -> None:
    with TestClient(create_app([offer_of(plain(), LIMITS)], LIMITS)) as client:
        assert refused(client, labels=said) == "labels for an unconditional model; expected none; leave labels out"
        assert client.post("/v1/images", json={"labels": None}).status_code == 200


@pytest.mark.parametrize(("said", "label"), [("1", 0), (1, 1), ("10", 2), ({"10": 1, "2": 0}, 2), (["2", 0], 1)])
def test_text_is_a_name_and_a_number_a_number(said: Any, label: int) -> None:
    """Where classes are called by numbers of others: class 0 is called 1."""
    model = dataclasses.replace(STUDENT, conditioner=Conditioner.of_classes(3, ("1", "2", "10")))
    with TestClient(create_app([offer_of(model, LIMITS)], LIMITS)) as client:
        assert torch.equal(pictures(client, labels=said), model.sample(1, labels=label, seed=4))
        assert refused(client, labels="0").startswith("labels: there is no class '0'; expected one of 1, 2, 10")
        assert refused(client, labels=3).startswith("label 3 is out of range; expected 0 to 2")
        schema = json.dumps(client.get("/openapi.json").json())
        assert '{"enum": ["1", "2", "10"]}' in schema


def test_classes_without_names_are_said_in_digits_too() -> None:
    model = dataclasses.replace(STUDENT, conditioner=Conditioner.of_classes(10))
    with TestClient(create_app([offer_of(model, LIMITS)], LIMITS)) as client:
        expected = model.sample(2, labels=[3, 7], seed=4)
        for said in ([3, 7], ["3", "7"], [3, "7"], ["003", 7]):
            assert torch.equal(pictures(client, count=2, labels=said), expected)
        assert torch.equal(pictures(client, labels={"3": 2, "7": 0}), expected[:1])
        assert refused(client, labels="10").startswith("label 10 is out of range; expected 0 to 9")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[1]", "the request is [1]; expected a JSON object; "),
        ("null", "the request is None; expected a JSON object; "),
        ('"x"', "the request is 'x'; expected a JSON object; "),
        ('{"model": "foo"}', "model 'foo'; expected student or null; "),
        ('{"model": "teacher"}', "model 'teacher'; expected student or null; "),
        ('{"count": 33}', "count 33; expected a whole number from 1 to 32; "),
        ('{"count": "4"}', "count '4'; expected a whole number from 1 to 32; "),
        ('{"count": true}', "count True; expected a whole number from 1 to 32; "),
        ('{"seed": -1}', "seed -1; expected a whole number from 0 to 9007199254740991; "),
        ('{"seed": null}', "seed None; expected a whole number from 0 to 9007199254740991; "),
        ('{"first": 1.5}', "first 1.5; expected a whole number from 0 to 2147483647; "),
        ('{"walk": [0]}', "walk [0]; expected a list of 2 numbers; "),
        ('{"walk": 1}', "walk 1; expected a list of 2 numbers; "),
        ('{"guidance": "much"}', "guidance 'much'; expected a number from 1.0 to 1.0; "),
        ('{"guidance": 2}', "guidance 2 for the student; expected 1; "),
        ('{"steps": "two"}', "steps 'two'; expected a whole number from 1 to 64 or null; "),
        ('{"steps": 65}', "steps 65 for the student; expected a number from 1 to 64; "),
        ('{"format": "exe"}', "format 'exe'; expected png or webp or npy; "),
        ('{"conditions": {"wind": 1}}', "conditions {'wind': 1}; expected null; "),
        ('{"col\\nour": 1}', "col\\nour: no such field; expected seed, count, "),
    ],
)
def test_other_mistakes_end_in_one_line_too(body: str, words: str, client: TestClient) -> None:
    answer = client.post("/v1/images", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(words)
    assert answer.json()["detail"].count("; ") == 2
    assert not re.search("Input should|Request|schema", answer.json()["detail"])


def test_a_label_among_conditions_is_not_lost() -> None:
    offer = offer_of(WINDY, LIMITS)
    for bad in ({"label": 3}, {"label": None, "wind": [1, 2]}):
        with pytest.raises(UserError, match=r"^a label among the conditions; expected classes as labels; "):
            offer.order(conditions=bad)
    with pytest.raises(UserError, match=r"^conditions \[1, 2\]; expected values by name; "):
        offer.order(conditions=[1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"count": 0}, {"count": -1}, {"first": -1}])
def test_pictures_that_are_none_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"^-?\d pictures from number -?\d; expected 1 or more, from 0 on; "):
        offer_of(STUDENT, LIMITS).order(**bad)


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
    [{"rain": 1.0}, {"label": 3}, {"wind": [1.0, 2.0, 3.0]}, {"wind": "strong"}, {"wind": []}, {"wind": None}, [1.0, 2.0]],
)
def test_bad_conditions_are_refused(said: Any, windward: TestClient) -> None:
    words = refused(windward, conditions=said)
    assert "wind" in words or "conditions" in words


def test_a_model_without_conditions_of_its_own_takes_none(client: TestClient) -> None:
    assert "conditions" in refused(client, conditions={"wind": [1.0, 2.0]})
    for none in (None, {}):
        assert pictures(client, conditions=none).shape == (1, 1, 8, 8)


def test_a_stream_takes_conditions(windward: TestClient) -> None:
    with windward.websocket_connect("/v1/stream", subprotocols=[PROTOCOL]) as stream:
        stream.send_text(json.dumps({"id": 1, "labels": "two", "seed": 4, "conditions": {"wind": [3.0, 1.0]}}))
        header, content = unpack(stream.receive_bytes())
    expected = WINDY.sample(1, labels=2, seed=4, conditions={"wind": [3.0, 1.0]})
    assert levels(pixels(header, content), expected) <= 1
