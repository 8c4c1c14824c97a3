"""The server against its own OpenAPI document, from which the cases are made when a test runs: while tests are collected, every
process would make them all."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import schemathesis
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.pytest.lazy import get_all_tests
from schemathesis.schemas import BaseSchema

from serve.helpers import StubDrawer, reader, stub_offer
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import Offer, offer_of

LIMITS = Limits(images=8, steps=4, window_ms=0)
BUFFER = io.BytesIO()
Image.new("L", (8, 8), 99).save(BUFFER, "PNG")
PICTURE = base64.b64encode(BUFFER.getvalue()).decode()
schemathesis.openapi.format("byte", st.just(PICTURE))
TOKEN = "a-token.of_enough~letters"


def schema_of(*offers: Offer, token: str | None = None) -> BaseSchema:
    """The document of a server of these models, with requests that keep to it and such that do not."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(list(offers), LIMITS, token=token))
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    return schema


def run_all(schema: BaseSchema, check: Callable[[schemathesis.Case], None]) -> list[str]:
    """Every request that the document allows, and many that it does not; the operations that were tried."""
    few = settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    tried = []
    for made in get_all_tests(schema=schema, test_func=check, settings=few, given_kwargs=None):
        operation, run = made.ok()
        run()
        tried.append(operation.label)
    return tried


def no_request_breaks_the_server(case: schemathesis.Case) -> None:
    body = case.body if isinstance(case.body, dict) else {}
    assume(not any(isinstance(body.get(name), str) and body[name] != PICTURE for name in ("picture", "mask")))  # are no files
    assume(body.get("keep") in (None, 2, 4) and not (body.get("keep") and body.get("mask")))
    response = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
    case.validate_response(response)
    assert response.status_code < 500


def no_prompt_breaks_the_server(case: schemathesis.Case) -> None:
    response = case.call()
    case.validate_response(response)
    assert response.status_code < 500


def test_no_request_breaks_the_server() -> None:
    schema = schema_of(stub_offer(StubDrawer(), LIMITS), token=TOKEN)
    tried = ["GET /healthz", "GET /metrics", "GET /v1/model", "POST /v1/images", "POST /v1/edit"]
    assert run_all(schema, no_request_breaks_the_server) == tried


def test_no_prompt_breaks_the_server() -> None:
    schema = schema_of(offer_of(reader(length=64), LIMITS, StubDrawer())).include(path="/v1/images")
    assert run_all(schema, no_prompt_breaks_the_server) == ["POST /v1/images"]
