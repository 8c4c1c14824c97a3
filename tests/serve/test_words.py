"""Prompts, as clients of the server say them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from serve.helpers import pictures, pixels, plain, reader, student
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of, offers_of
from trigflow.serve.service import Service
from trigflow.serve.stream import PROTOCOL
from trigflow.serve.wire import unpack

LIMITS = Limits(images=8, batch=4, window_ms=0)
READER = reader(guidance_max=4.0)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app([offer_of(READER, LIMITS)], LIMITS)) as client:
        yield client


def levels(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("said", ["cat", "  two\twords ", "قلب أحمر", "🐳", ["cat", "dog"], ["cat", "", "🐳"]])
def test_a_prompt_is_that_of_python(said: Any, client: TestClient) -> None:
    drawn = pictures(client, count=4, prompt=said, guidance=2)
    assert levels(drawn, READER.sample(4, prompt=said, seed=4, guidance=2.0)) <= 1
    assert levels(drawn, pictures(client, count=4, guidance=2)) > 3


def test_no_prompt_is_the_empty_one(client: TestClient) -> None:
    assert torch.equal(pictures(client, prompt=None), pictures(client))
    assert torch.equal(pictures(client, prompt=""), pictures(client))


def test_pictures_of_different_prompts_are_drawn_together(client: TestClient) -> None:
    both = pictures(client, count=2, prompt=["cat", "a green heart"])
    assert levels(both[:1], pictures(client, prompt="cat")) <= 1
    assert levels(both[1:], pictures(client, first=1, prompt="a green heart")) <= 1


BAD: list[tuple[Any, str]] = [
    ("x" * 24, "a prompt of 24 bytes, 'xxxxxxxxxxxxxxxxxxxxxxxx'; expected at most 23; "),
    ("🐳" * 6, "a prompt of 24 bytes, '🐳"),
    ("x" * 10_000, "a prompt of 10000 bytes, 'xxxxxx"),
    ("a\x00b", r"the text 'a\x00b' has '\x00' in it; expected text that can be printed; "),
    (3, "prompt: 3 is no text; expected a text or a list of them; "),
    ([], "prompt: [] is no text; "),
    (["cat", 3], "prompt: ['cat', 3] is no text; "),
    ({"cat": 0}, "a mix of prompt with the weights [0]; expected numbers of at least 0"),
    ({"x" * 24: 1}, "a prompt of 24 bytes"),
    (
        ["cat"] * 9,
        "prompt ['cat', 'cat', 'cat', 'cat', 'cat', 'cat', ...]; expected a text of at most 23 bytes in UTF-8, a list ",
    ),
]


@pytest.mark.parametrize(("said", "words"), BAD)
def test_bad_prompts_are_refused_in_one_line(said: Any, words: str, client: TestClient) -> None:
    answer = client.post("/v1/images", json={"prompt": said})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert detail.startswith(words)
    assert detail.count("; ") == 2
    assert "\n" not in detail
    assert len(detail) < 300
    if not isinstance(said, list) or len(said) < 9:
        with pytest.raises(UserError) as caught:
            READER.sample(1, prompt=said)
        assert str(caught.value) == detail


def test_half_of_a_character_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/images", content='{"prompt": "\\ud83d"}', headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"].count("; ") == 2


def test_a_prompt_of_ten_megabytes_is_refused_unread(client: TestClient) -> None:
    answer = client.post("/v1/images", json={"prompt": "x" * 10_000_000})
    assert answer.status_code == 413


def test_the_limit_of_the_server_counts_too() -> None:
    limits = Limits(images=8, window_ms=0, prompt_bytes=4)
    with TestClient(create_app([offer_of(READER, limits)], limits)) as client:
        assert client.get("/v1/model").json()["models"]["student"]["prompt_bytes"] == 4
        assert client.post("/v1/images", json={"prompt": "🐳"}).status_code == 200
        assert "expected at most 4; " in client.post("/v1/images", json={"prompt": "whale"}).json()["detail"]


def test_models_of_no_words_take_no_prompt() -> None:
    for model in (plain(), student()):
        with TestClient(create_app([offer_of(model, LIMITS)], LIMITS)) as client:
            assert client.get("/v1/model").json()["models"]["student"]["prompt_bytes"] == 0
            answer = client.post("/v1/images", json={"prompt": "cat"})
            assert answer.status_code == 422
            assert answer.json()["detail"].endswith("leave prompt out")
            assert client.post("/v1/images", json={"prompt": None}).status_code == 200
            assert schema_of(client)["prompt"]["type"] == "null"


def schema_of(client: TestClient) -> dict[str, Any]:
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/images"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties: dict[str, Any] = body["properties"]
    return properties


def test_what_is_served_says_how_much_is_read(client: TestClient) -> None:
    assert client.get("/v1/model").json()["models"]["student"]["prompt_bytes"] == 23
    text, turn, mix, none = schema_of(client)["prompt"]["anyOf"]
    assert (text["type"], text["maxLength"], none) == ("string", 23, {"type": "null"})
    assert (turn["items"], turn["maxItems"], mix["propertyNames"]) == (text, 8, text)


def test_there_is_one_way_to_say_a_text(client: TestClient) -> None:
    assert client.post("/v1/images", json={"conditions": {"text": "cat"}}).status_code == 422


def test_a_mix_of_prompts(client: TestClient) -> None:
    mixed = pictures(client, prompt={"cat": 1, "dog": 3, "": 0})
    assert levels(mixed, READER.sample(1, prompt={"cat": 0.25, "dog": 0.75}, seed=4)) <= 1
    assert levels(mixed, pictures(client, prompt="cat")) > 3


def test_a_stream_takes_a_prompt(client: TestClient) -> None:
    with client.websocket_connect("/v1/stream", subprotocols=[PROTOCOL]) as stream:
        stream.send_text(json.dumps({"id": 1, "prompt": "🐳 whale", "seed": 4}))
        header, content = unpack(stream.receive_bytes())
    assert levels(pixels(header, content), READER.sample(1, prompt="🐳 whale", seed=4)) <= 1


@pytest.mark.parametrize(("length", "served"), [(24, True), (12, False), (0, False)])
def test_a_teacher_has_to_read_the_same_texts(length: int, served: bool, tmp_path: Path) -> None:
    READER.save(tmp_path)
    teacher = reader("diffusion", length) if length else dataclasses.replace(plain(), sampling=Sampling())
    teacher.save(tmp_path / "teacher")
    offers = offers_of(tmp_path, Limits(batch=1), "cpu", "plain")
    assert [offer.name for offer in offers] == ["student", "teacher"][: 1 + served]


def test_large_encoders_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, begun, known = READER.conditioner.inputs["text"], threading.Event(), threading.Event()
    rows = type(reader).rows

    def slowly(self: Any, *said: Any) -> Any:
        begun.set()
        assert known.wait(20)  # for what the loop does meanwhile
        return rows(self, *said)

    service = Service([offer_of(READER, LIMITS)], LIMITS)
    monkeypatch.setattr(type(reader), "kept", None, raising=False)  # by which such an encoder is known
    monkeypatch.setattr(type(reader), "rows", slowly)

    async def other() -> None:
        while not begun.is_set():
            await asyncio.sleep(0.001)
        known.set()

    async def both() -> Any:
        return (await asyncio.gather(service.order(service.images_request(prompt="cat")), other()))[0]

    name, order = asyncio.run(both())
    assert name == "student"
    assert torch.equal(order.conditions["text"], READER.conditioner.conditions({"text": "cat"}, 1)["text"])
