"""The server against its own OpenAPI document."""

from __future__ import annotations

import base64
import io

import schemathesis
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode

from serve.helpers import StubDrawer, reader, stub_offer
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of

LIMITS = Limits(images=8, steps=4, window_ms=0)
APP = create_app([stub_offer(StubDrawer(), LIMITS)], LIMITS, token="a-token.of_enough~letters")
BUFFER = io.BytesIO()
Image.new("L", (8, 8), 99).save(BUFFER, "PNG")
PICTURE = base64.b64encode(BUFFER.getvalue()).decode()
schemathesis.openapi.format("byte", st.just(PICTURE))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
WORDS = create_app([offer_of(reader(length=64), LIMITS, StubDrawer())], LIMITS)
WORDS_SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", WORDS).include(path="/v1/images")
WORDS_SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
HEADERS = {"Authorization": "Bearer a-token.of_enough~letters"}


@SCHEMA.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(case: schemathesis.Case) -> None:
    body = case.body if isinstance(case.body, dict) else {}
    assume(not any(isinstance(body.get(name), str) and body[name] != PICTURE for name in ("picture", "mask")))  # are no files
    assume(body.get("keep") in (None, 2, 4) and not (body.get("keep") and body.get("mask")))
    response = case.call(headers=HEADERS)
    case.validate_response(response)
    assert response.status_code < 500


@WORDS_SCHEMA.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_no_prompt_breaks_the_server(case: schemathesis.Case) -> None:
    response = case.call()
    case.validate_response(response)
    assert response.status_code < 500
