"""`POST /v1/edit`, and mixes of texts."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from deploy.reading import reading
from serve.helpers import StubDrawer, stub_offer, student
from trigflow.models.model import Model
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of

LIMITS = Limits(images=16, batch=4, window_ms=0, edit_bytes=20_000, edit_pixels=10_000)
GRAY = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MASK = torch.zeros(8, 8, dtype=torch.uint8)
MASK[2:5, 3:] = 255


def file(image: Tensor | np.ndarray, format: str = "PNG") -> str:
    """An image `(h, w)` or `(c, h, w)` as a file in base64."""
    pixels = np.asarray(image)
    pixels = pixels if pixels.ndim == 2 else pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of a student of digits."""
    with TestClient(create_app([offer_of(student(), LIMITS)], LIMITS)) as client:
        yield client


@pytest.fixture(scope="module")
def reader() -> Iterator[TestClient]:
    """A server of a student that reads words and draws colours."""
    with TestClient(create_app([offer_of(reading(), LIMITS)], LIMITS)) as client:
        yield client


def pictures(client: TestClient, path: str = "/v1/edit", **asked: Any) -> Tensor:
    answer = client.post(path, json={"format": "npy", "seed": 4, **asked})
    assert answer.status_code == 200, answer.text
    return torch.from_numpy(np.load(io.BytesIO(answer.content), allow_pickle=False))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to one level: drawn in parts, sums are rounded in another order."""
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_what_is_outside_the_mask_stays(client: TestClient, format: str) -> None:
    how: dict[str, Any] = {"labels": [3, 7], "strength": 0.9, "steps": 3}
    found = pictures(client, picture=file(GRAY, format), mask=file(MASK), count=6, **how)  # in two parts
    assert torch.equal(found[..., MASK == 0], GRAY[..., MASK == 0].expand(6, 1, -1))
    assert close(found, student().edit(GRAY, 6, seed=4, mask=MASK, **how))


def test_transparent_pixels_are_drawn(client: TestClient) -> None:
    clear = torch.cat([GRAY.expand(3, -1, -1), 255 - MASK[None]])
    assert close(pictures(client, picture=file(clear), count=2), student().edit(GRAY, 2, seed=4, mask=MASK))


def test_opaque_pictures_with_transparency_are_as_those_without(client: TestClient) -> None:
    opaque = torch.cat([GRAY.expand(3, -1, -1), torch.full_like(GRAY, 255)])
    assert torch.equal(pictures(client, picture=file(opaque), strength=0.9), pictures(client, picture=file(GRAY), strength=0.9))


def test_strength_and_mixes_of_classes(client: TestClient) -> None:
    near = pictures(client, picture=file(GRAY), strength=1e-4, labels={"3": 1, "5": 2})
    assert close(near, GRAY[None])
    assert close(pictures(client, picture=file(GRAY)), student().edit(GRAY, seed=4, strength=0.5))
    assert close(pictures(client, picture=file(GRAY), strength=1), student().sample(1, seed=4))


def test_colours_and_details(reader: TestClient) -> None:
    said = {"prompt": "red", "count": 2}
    model, weights = reading(), torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    coloured = pictures(reader, picture=file(GRAY), keep="gray", **said)
    assert ((weights * coloured).sum(1, keepdim=True) - GRAY).abs().max() <= 0.5 + 1e-6
    assert close(coloured, model.edit(GRAY, 2, keep="gray", seed=4, prompt="red"))
    detailed = pictures(reader, picture=file(GRAY[:, :4, :4].expand(3, -1, -1)), keep=2, **said)
    assert (torch.nn.functional.avg_pool2d(detailed.double(), 2) - GRAY[:, :4, :4]).abs().max() <= 0.5


def words(model: Model, **weights: float) -> Tensor:
    return model.sample(3, prompt=weights, seed=4)


def test_a_mix_of_texts(reader: TestClient) -> None:
    model = reading()
    ends = [model.sample(3, prompt=text, seed=4) for text in ("red", "blue")]
    assert torch.equal(words(model, red=1.0, blue=0.0), ends[0])
    mixed = pictures(reader, "/v1/images", count=3, prompt={"red": 1, "blue": 3})
    assert close(mixed, words(model, red=0.25, blue=0.75))
    assert not close(mixed, ends[0])
    assert not close(mixed, ends[1])
    assert close(pictures(reader, "/v1/images", count=6, prompt={"red": 1, "blue": 3})[:3], mixed)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({}, "a mix of prompt with the weights []"),
        ({"red": -1}, "a mix of prompt with the weights [-1]"),
        (dict.fromkeys("abcde", 1), "a mix of 5 texts; expected at most 4; mix fewer"),
        ({"a" * 16: 1}, "a prompt of 16 bytes"),
        ({"red": "much"}, "a mix of prompt with the weights ['much']"),
    ],
)
def test_bad_mixes_of_texts(reader: TestClient, prompt: dict[str, Any], said: str) -> None:
    answer = reader.post("/v1/images", json={"prompt": prompt})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "picture is missing; expected a PNG, JPEG or WebP file in base64; add it"),
        ({"picture": "not base64!"}, "picture 'not base64!'; expected a PNG, JPEG or WebP file in base64; correct picture"),
        ({"picture": ""}, "picture ''; expected a PNG"),
        ({"picture": 3}, "picture 3; expected a PNG"),
        ({"picture": "abcde"}, "picture"),
        ({"picture": "bm8gcGljdHVyZQ=="}, "the picture cannot be read (it is no PNG, JPEG or WebP); expected a whole PNG"),
        ({"picture": file(GRAY)[:60]}, "the picture cannot be read"),
        ({"picture": file(np.zeros((101, 100), np.uint8))}, "a picture of 100x101; expected at most 10000 pixels; shrink it"),
        ({"mask": file(MASK[:4])}, "a mask of (8, 4) pixels for a picture of (8, 8); expected the same size; resize the mask"),
        ({"mask": "bm8gcGljdHVyZQ=="}, "the mask cannot be read"),
        ({"mask": file(MASK), "keep": 2}, "a mask and something to keep inside it; expected one of them"),
        ({"strength": 0}, "strength 0; expected a number above 0, at most 1, or null; correct strength"),
        ({"strength": 1.1}, "strength 1.1; expected"),
        ({"strength": "much"}, "strength 'much'; expected"),
        ({"keep": "colour"}, "keep 'colour'; expected gray, a whole number, or null; correct keep"),
        ({"keep": "gray"}, "keep gray for pictures of shape (1, 8, 8); expected 3 channels"),
        ({"keep": 3}, "blocks of side 3"),
        ({"keep": True}, "keep True; expected"),
        ({"count": 17}, "count 17; expected"),
        ({"unknown": 1}, "unknown: no such field; expected "),
    ],
)
def test_bad_requests_are_refused_in_one_line(client: TestClient, asked: dict[str, Any], said: str) -> None:
    body = asked if not asked or "picture" in asked else {"picture": file(GRAY), **asked}
    answer = client.post("/v1/edit", json=body)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert detail.startswith(said)
    assert "\n" not in detail
    assert detail.count("; ") == 2
    assert len(detail) < 500


def test_a_body_is_bounded(client: TestClient) -> None:
    assert client.post("/v1/edit", json={"picture": "A" * 20_000}).status_code == 413
    assert client.post("/v1/edit", content=b"{}", headers={"content-type": "multipart/form-data"}).status_code == 415


def test_beside_its_pictures_a_body_holds_no_more_than_any_other() -> None:
    """Millions of small values would keep everybody waiting while they are read."""
    limits = Limits(body_bytes=1_000)
    with TestClient(create_app([stub_offer(StubDrawer(), limits)], limits)) as client:
        for labels, status in (([0] * 900, 422), ([0] * 1_100, 413), ([[]] * 600, 413)):
            assert client.post("/v1/edit", json={"picture": file(GRAY), "labels": labels}).status_code == status


def test_the_document_describes_it(client: TestClient) -> None:
    path = client.get("/openapi.json").json()["paths"]["/v1/edit"]["post"]
    fields = path["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"picture", "mask", "strength", "keep", "count", "labels", "seed"} <= fields.keys()
    assert {"200", "413", "415", "422", "429"} <= path["responses"].keys()
